"""The sampler has the controls of each family: an image, a negative prompt, options, segments, two experts."""

import io

import pytest
import torch
from PIL import Image

from vader_nb import Prompt, Sampling, Video, extend, load, sample
from vader_nb.clip_request import NONE, Request
from vader_nb.video import GAP, joined
from vader_nb.widgets import RewardComparison, RewardComposer, Sampler, TruncationExplorer, families
from vader_nb.widgets.player import Player, moving, pictures, segments

from .test_wan import SMALL, pipeline, transformer

ASK = "a red star growing on a gray background"
QUICK = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def i2v():
    return load("tiny-i2v", check=False)


@pytest.fixture
def sampler(i2v, tmp_path):
    made = Sampler(i2v, prompt=ASK, folder=tmp_path)
    made.set(**QUICK)
    return made


@pytest.fixture(scope="module")
def wan():
    return load("tiny-wan", check=False)


def picture(color=(200, 30, 30), size=(80, 48)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "JPEG")
    return buffer.getvalue()


def same_as_its_code(sampler, **names):
    *lines, last = sampler.code.splitlines()
    exec("\n".join([*lines, f"made = {last}"]), names)
    torch.testing.assert_close(names["made"].frames, sampler.video.frames, rtol=0, atol=2e-4)
    assert names["made"].fps == sampler.video.fps


def test_each_family_has_its_controls(tiny, wan, sampler):
    text, flow = (Sampler(model).settings for model in (tiny, wan))
    assert {"negative_prompt", "guidance_rescale"} <= text.keys() & flow.keys()
    assert not {"extend", "flow_shift", "fps"} & text.keys()
    assert "flow_shift" in flow
    own = {"extend", "fps", "motion_bucket_id", "noise_aug_strength", "min_guidance_scale"}
    assert own <= sampler.settings.keys()
    assert not {"negative_prompt", "guidance_rescale"} & sampler.settings.keys()  # it reads no text
    assert sampler.first.box.layout.display == "flex"
    assert list(sampler.adapter.options) == [NONE]  # no adapter of another model is offered


def test_a_negative_prompt_and_rescaled_guidance_act(tiny):
    sampler = Sampler(tiny, adapters={}, prompt=ASK)
    plain = sampler.run(**QUICK)
    away = sampler.run(negative_prompt="a gray background", guidance_rescale=0.7)
    wanted = sample(
        tiny, Prompt(ASK, "a gray background"), sampling=Sampling(2, guidance_rescale=0.7)
    )
    torch.testing.assert_close(away.frames, wanted[0])
    assert not torch.equal(plain.frames, away.frames)
    assert "rescaled 0.7" in sampler.caption.value and "not “a gray" in sampler.caption.value
    same_as_its_code(sampler)
    sampler.set(guidance_scale=1.0)
    assert sampler.negative_prompt.disabled and sampler.guidance_rescale.disabled
    assert "guidance is off" in sampler.negative_prompt.tooltip


def test_options_are_those_of_the_family(wan, sampler):
    sampler.run(motion_bucket_id=20, fps=14)
    assert sampler.request.options == (("fps", 14), ("motion_bucket_id", 20))
    assert sampler.video.fps == 16  # it was told twice its 7 frames per second, and plays at 8
    same_as_its_code(sampler)
    flow = Sampler(wan, prompt=ASK)
    plain = flow.run(**QUICK)
    assert not flow.request.options
    shifted = flow.run(flow_shift=9)
    assert not torch.equal(plain.frames, shifted.frames)
    assert "flow_shift 9" in flow.caption.value
    same_as_its_code(flow)
    flow.set(flow_shift=None)
    assert not flow.request.options
    flow.flow_shift.value = "fast"
    assert "flow_shift must be a number, or empty" in flow.remark.value
    flow.flow_shift.value = "-1"
    assert "flow_shift must be at least" in flow.remark.value


def test_a_clip_starts_from_an_image_and_goes_on_from_its_last_frame(sampler, i2v, tmp_path):
    sampler.run(image=picture())
    given = Image.open(io.BytesIO(picture()))
    wanted = sample(i2v, Prompt(ASK, image=given), sampling=Sampling(2))
    torch.testing.assert_close(sampler.video.frames, wanted[0])
    assert "from your image" in sampler.caption.value
    assert "<img" in sampler.first.shown.value
    path = sampler.save()
    start = path.with_name("clip-001-start.png")
    assert Image.open(start).size == given.size
    assert "clip-001-start.png" in path.with_suffix(".txt").read_text()

    last = sampler.video.frames[-1]
    sampler.first.again.click()
    assert Image.open(io.BytesIO(sampler.first.data)).size == (64, 64)
    first = sampler.video.frames[0]
    assert (first - last).abs().mean() < (first - wanted[0][0]).abs().mean() + 0.05
    sampler.back(1)
    assert sampler.first.data == picture()  # with its image
    sampler.first.forget.click()
    assert sampler.first.data is None and sampler.first.forget.disabled


def test_what_is_no_image_is_said(sampler, tiny):
    sampler.first._uploaded()  # nothing was chosen
    assert sampler.error is None
    with pytest.raises(ValueError, match="this image cannot be read"):
        sampler.run(image=b"text")
    with pytest.raises(ValueError, match="'tiny' makes clips from text alone"):
        Sampler(tiny, adapters={}).run(image=torch.zeros(3, 64, 64))
    assert sampler.first.data is None
    fresh = Sampler(sampler.model)
    fresh.first.again.click()
    assert "no clip yet to continue from" in fresh.remark.value


def test_a_long_clip_is_that_of_extend_and_its_seams_are_marked(sampler, i2v):
    video = sampler.run(extend=3)
    wanted = extend(i2v, None, times=3, prompts=ASK, sampling=Sampling(2))
    torch.testing.assert_close(video.frames, wanted[0])
    assert len(sampler.player.pages.children) == 1 + 22
    pages = [page.value for page in sampler.player.pages.children]
    assert "segment 1, to frame 8" in pages[0] and "<b" not in pages[0]
    assert pages[8].count("<b") == 1 and "<b style='flex:8'>segment 1" in pages[8]
    assert "<b style='flex:7'>segment 2, to frame 15" in pages[9]
    same_as_its_code(sampler)
    assert segments([8]) == ""


def test_two_experts_have_their_steps_and_a_scale(tmp_path):
    pipeline(transformer_2=transformer(4, seed=1), boundary_ratio=0.875).save_pretrained(tmp_path)
    model = load(tmp_path)
    model.defaults |= SMALL
    sampler = Sampler(model, prompt="a")
    plain = sampler.run(num_inference_steps=5, guidance_scale=4.0)
    assert "transformer: steps 1 to 2 · transformer_2: steps 3 to 5" in sampler.caption.value
    other = sampler.run(guidance_scale_2=1)
    assert not torch.equal(plain.frames, other.frames)
    assert "guidance_scale_2 1" in sampler.caption.value


def test_the_other_panels_take_prompts_with_images(i2v, tmp_path):
    generator = torch.Generator().manual_seed(0)
    given = [Prompt(f"{ASK} {n}", image=torch.rand(3, 64, 64, generator=generator)) for n in "ab"]
    wanted = sample(i2v, given, seeds=[0, 0], sampling=Sampling(1))
    comparison = RewardComparison(
        i2v, rewards=[lambda frames, _: frames.mean((1, 2, 3, 4))], prompts=given, folder=tmp_path,
        sampling=Sampling(1),
    )  # fmt: skip
    comparison.run(prompt=str(given[1]))
    made = comparison.data.clips[str(given[1]), "base"].pixels()
    torch.testing.assert_close(made, wanted[1], atol=1 / 255, rtol=0)
    composer = RewardComposer(
        i2v, {"red": lambda frames, _: frames[:, :, 0].mean((1, 2, 3))}, given
    )
    assert composer.prompts == [str(prompt) for prompt in given]
    explorer = TruncationExplorer(i2v, "aesthetic", given[0])
    assert explorer.prompt == str(given[0])


# ------------------------------------------------------------------------------------------------------- real clips


def real(frames=9, height=480, width=832):
    """A clip as smooth as a real one."""
    y, x = torch.meshgrid(torch.linspace(0, 9, height), torch.linspace(0, 9, width), indexing="ij")
    waves = [torch.sin(x + 0.2 * t) * torch.cos(y - 0.1 * t) / 2 + 0.5 for t in range(frames)]
    return torch.stack(waves)[:, None].expand(-1, 3, -1, -1)


def test_a_large_clip_is_h264_with_a_frame_where_that_cannot_play():
    video = Video(real(), 16, "waves")
    page, *frames = pictures(video, "waves & more")
    assert page.startswith("<video") and "data:video/mp4" in page and "poster=" in page
    assert 'aria-label="waves &amp; more"' in page
    assert len(frames) == 9 and all("image/jpeg" in frame for frame in frames)
    assert sum(map(len, [page, *frames])) < 1_000_000  # GIF and PNG would take 4 million
    assert moving(Video(real(8, 64, 64)), "small").startswith("<img")
    player = Player(9)
    player.show([page, *frames])


def test_eight_large_clips_play_in_step_in_one_picture_that_players_take():
    video = joined([real(3)] * 8, 16, "eight")
    assert video.frames.shape == (3, 3, 138, 8 * 240 + 7 * GAP)
    assert moving(video, "eight").startswith("<video")


# ------------------------------------------------------------------------------------------ base beside the adapter


def test_the_base_is_beside_the_adapter_and_made_once(tiny):
    sampler = Sampler(tiny, prompt=ASK)
    assert sampler.adapter.value == "hps"  # the one that helps
    aligned = sampler.run(**QUICK)
    (base,) = sampler._bases.values()
    torch.testing.assert_close(base.frames, sample(tiny, ASK, sampling=Sampling(2))[0])
    page = sampler.player.pages.children[0].value
    assert "<th>base</th><th>1 × hps</th>" in page
    assert "same noise" in sampler.caption.value
    sampler.scale.value = 0.5
    assert list(sampler._bases.values()) == [base]
    assert sampler.video is not aligned
    sampler.run(adapter=NONE)
    assert "<th>" not in sampler.player.pages.children[0].value
    sampler.set(adapter="hps")
    sampler.beside.value = False
    assert "<th>" not in sampler.player.pages.children[0].value
    assert "same noise" not in sampler.caption.value


def test_clips_that_are_large_are_not_kept_without_end(tiny, monkeypatch):
    sampler = Sampler(tiny, prompt=ASK)
    size = sampler.run(**QUICK).frames.nbytes
    monkeypatch.setattr("vader_nb.widgets.sampler.MEMORY", 2.5 * size)
    for seed in range(1, 5):
        sampler.run(seed=seed)
    assert len(sampler.history) == len(sampler._bases) == 2
    assert [slot.layout.display for slot in sampler._slots].count("flex") == 2


# ----------------------------------------------------------------------------------------- what the tiny world knows


def test_the_words_of_the_tiny_world_are_under_the_prompt(tiny, i2v):
    sampler = Sampler(tiny, adapters={}, prompt=ASK)
    for word in ("purple", "triangle", "bouncing", "sand"):
        assert word in sampler.words.value
    assert "role=status" not in sampler.words.value
    sampler.set(prompt="a <cat>")
    assert "knows none of these words" in sampler.words.value
    sampler.set(prompt="a red cat on a gray sofa.")
    assert "does not know: cat, sofa." in sampler.words.value
    assert families.unknown(tiny, "A red star, spinning!") == ""


def test_a_request_of_the_base_is_the_same_whatever_the_adapter_is():
    one = Request("x", 3, adapter="a", scale=0.5, second="b", start=0.5, options=(("fps", 3),))
    other = Request("x", 3, options=(("fps", 3),))
    assert one.base == other == other.base
    assert one.base != Request("x", 3).base
