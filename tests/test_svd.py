"""Stable Video Diffusion: against diffusers' own pipeline, its full size, what its decoder mixes, bad images."""

import warnings
from dataclasses import replace
from functools import partial

import diffusers
import pytest
import torch
from PIL import Image

from vader_nb import (
    Prompt,
    Trainer,
    align,
    evaluate,
    extend,
    load,
    lora,
    metrics,
    models,
    rewards,
    testing,
)
from vader_nb.estimators import Batch
from vader_nb.long_clips import LongRewardGradient
from vader_nb.models.svd import PUBLISHED
from vader_nb.sampling import Sampling, derived_seed, join, roll_out, sample
from vader_nb.strategies import DRTune, Frames, Last
from vader_nb.testing import REWARDS, adapted, check_model, take_gradient
from vader_nb.train_config import TrainConfig

SETTINGS = {"num_inference_steps": 3, "num_frames": 4, "height": 32, "width": 24}


def picture(seed: int) -> Image.Image:
    pixels = torch.rand(32, 24, 3, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((pixels * 255).byte().numpy())


PROMPTS = [Prompt("a wave", image=picture(1)), Prompt("a tree", image=picture(2))]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("svd")
    svd_pipeline().save_pretrained(folder)
    return folder


def svd_pipeline():
    """A `StableVideoDiffusionPipeline` of 1.4 M random weights, built of the libraries' own classes."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    unet = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        num_attention_heads=(2, 2),
        cross_attention_dim=16,
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
        num_frames=4,
    )
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        layers_per_block=1,
    )
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=224,
        patch_size=112,
        projection_dim=16,
    )
    scheduler = diffusers.EulerDiscreteScheduler(**PUBLISHED["scheduler"])
    return diffusers.StableVideoDiffusionPipeline(
        vae, CLIPVisionModelWithProjection(config), unet, scheduler, CLIPImageProcessor()
    )


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_latents_and_frames_are_those_of_diffusers_pipeline(directory, guidance_scale):
    model = load(directory)
    pipeline = diffusers.StableVideoDiffusionPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    options = {"motion_bucket_id": 80, "noise_aug_strength": 0.1, "fps": 9}
    sampling = Sampling(**SETTINGS, guidance_scale=guidance_scale, options=options).resolve(model)
    for output_type in ("latent", "pt"):
        theirs = pipeline(
            [prompt.image for prompt in PROMPTS],
            max_guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in (5, 9)],
            output_type=output_type,
            decode_chunk_size=4,
            **SETTINGS,
            **options,
        ).frames
        if output_type == "latent":
            ours = roll_out(model, PROMPTS, [5, 9], sampling).latents.transpose(1, 2)
        else:
            ours = sample(model, PROMPTS, seeds=[5, 9], sampling=sampling)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_it_keeps_the_promises_of_a_model(directory, monkeypatch):
    model = load(directory, dtype=torch.float64)
    sampling = Sampling(num_inference_steps=5, num_frames=4, height=16, width=24)
    report = check_model(model, sampling, strategies=[Last(2), DRTune(2, stop=1)])
    assert len(report) == 15
    monkeypatch.setattr(testing, "CHECKS", (testing.decodings,))
    model.decode_vjp = lambda latents, frames, gradient, decode_chunk_size=1: latents
    with pytest.raises(AssertionError, match=r"decode_vjp against autograd .* FAILED"):
        check_model(model, sampling, strategies=[])
    with pytest.raises(ValueError, match="in torch.float32: load it with dtype=torch.float64"):
        check_model(load(directory))


def test_chunks_of_the_decoder_are_each_by_themselves(directory):
    model = load(directory, dtype=torch.float64)
    latents = torch.randn(2, 4, 5, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    whole = model.decode(latents)
    model.defaults["decode_chunk_size"] = 2
    parts = [model.decode(latents[:, :, i : i + 2]) for i in (0, 2, 4)]
    assert torch.equal(model.decode(latents), torch.cat(parts, dim=1))
    assert torch.equal(model.decode(latents, [3, 0, -1]), torch.cat(parts, dim=1)[:, [3, 0, 4]])
    assert not torch.allclose(model.decode(latents), whole)


def test_full_size_is_the_published_one():
    with torch.device("meta"):
        model = models.from_config("svd")
    counts = [sum(p.numel() for p in module.parameters()) / 1e6 for module in model.modules()]
    assert [round(count, 1) for count in counts[:2]] == [1524.6, 97.7]
    assert round(counts[2]) == 632  # ViT-H/14


@pytest.mark.parametrize(
    "image, message",
    [
        (None, "continues an image: give Prompt"),
        (torch.zeros(32, 24), "must be a float tensor"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "must be a float tensor"),
        (torch.full((3, 8, 8), 1.5), r"must lie in \[0, 1\], got 1.5"),
        (torch.full((3, 8, 8), float("nan")), r"must lie in \[0, 1\], got nan"),
    ],
)
def test_bad_images(directory, image, message):
    with pytest.raises(ValueError, match=message):
        sample(load(directory), Prompt("a wave", image=image), sampling=Sampling(**SETTINGS))
    for fps, problem in ((0, "at least 1"), ("fast", "a number, got 'fast'")):
        with pytest.raises(ValueError, match=f"fps must be {problem}"):
            Sampling(options={"fps": fps}).resolve(load(directory))


@pytest.mark.parametrize("steps", [10, 25])
def test_the_last_step_hardly_moves_the_video_and_training_says_so(directory, steps, tmp_path):
    model = load(directory)
    sampling = Sampling(**SETTINGS | {"num_inference_steps": steps}).resolve(model)
    assert model.last_step_gain(sampling) == pytest.approx(0.002, rel=0.01)
    assert load("tiny").last_step_gain(Sampling().resolve(load("tiny"))) > 0.05
    settings = TrainConfig(sampling=sampling, output_dir=tmp_path)
    with pytest.warns(UserWarning, match=r"moves the video by 0.002 .* strategy=ReFL"):
        Trainer(model, rewards.brightness(), PROMPTS, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Trainer(model, rewards.brightness(), PROMPTS, replace(settings, strategy=Last(3)))


# ------------------------------------------------------------------------------------------ long clips


def test_a_long_clip_continues_its_last_frames(directory):
    model, sampling = load(directory), Sampling(**SETTINGS)
    first = sample(model, PROMPTS, seeds=[5, 9], sampling=sampling)
    again = [Prompt(p.text, image=clip[-1]) for p, clip in zip(PROMPTS, first)]
    own = [derived_seed(seed, 1) for seed in (5, 9)]
    second = sample(model, again, seeds=own, sampling=sampling)
    long = sample(model, PROMPTS, seeds=[5, 9], sampling=Sampling(**SETTINGS, extend=2))
    assert torch.equal(long, join([first, second])) and long.shape[1] == 7
    assert torch.equal(
        extend(model, None, times=2, prompts=PROMPTS, seeds=[5, 9], sampling=sampling), long
    )
    longer = extend(model, first, times=2, seeds=[1, 2], sampling=sampling)
    assert torch.equal(longer[:, :4], first) and longer.shape[1] == 7
    with pytest.raises(ValueError, match="times=1 must be at least 2"):
        extend(model, first, times=1)
    with pytest.raises(ValueError, match="must be a tensor, an image or clips, got str"):
        extend(model, "clip.mp4")
    with pytest.raises(ValueError, match="a roll-out is one segment, and extend=2 takes several"):
        roll_out(model, PROMPTS, [5, 9], Sampling(**SETTINGS, extend=2).resolve(model))
    with pytest.raises(ValueError, match="makes videos from text alone and cannot continue"):
        sample(load("tiny"), "a red star", sampling=Sampling(extend=2))


@pytest.mark.parametrize("segments", ["all", "2", "last"])
def test_the_gradient_of_a_long_clip_is_that_of_the_named_segments(directory, segments):
    """Against autograd, where every other segment and every seam is given."""
    model = load(directory, dtype=torch.float64)
    sampling = Sampling(**SETTINGS | {"height": 16}, extend=3).resolve(model)
    adapter, reward = adapted(model), REWARDS["clip"]
    learning = {"all": [0, 1, 2], "2": [1], "last": [2]}[segments]
    clips, prompts = [], PROMPTS
    for index in range(3):
        one = Sampling(**SETTINGS | {"height": 16}).resolve(model)
        own = [derived_seed(seed, index) for seed in (5, 9)]
        rollout = roll_out(model, prompts, own, one, window=1)
        t, scheduler = rollout.timesteps[0], rollout.at_window()[0]
        scaled = model.scale_input(scheduler, rollout.states[0], t)
        output = model.guided(scaled, t, rollout.conditioning, one)
        clip = model.decode(model.step(scheduler, output, t, rollout.states[0]))
        clips.append(clip if index in learning else clip.detach())
        prompts = [Prompt(p.text, image=c[-1].detach().float()) for p, c in zip(prompts, clip)]
    (-reward(join(clips), ["", ""]).mean()).backward()
    expected = take_gradient(adapter)
    estimator = LongRewardGradient()
    config = TrainConfig(segments=segments, sampling=sampling, frames=Frames.all())
    estimator.setup(model, adapter, reward, config)
    collected = estimator.collect(Batch(PROMPTS, [5, 9], torch.Generator()))
    row = estimator.accumulate(collected, 1.0, torch.Tensor.backward)
    found = take_gradient(adapter)
    assert (found - expected).norm() <= 1e-9 * expected.norm() > 0
    torch.testing.assert_close(row.rewards, reward(join(clips), ["", ""]).detach())


def test_align_trains_on_long_clips(directory, tmp_path):
    sampling = Sampling(**SETTINGS, extend=2)
    options = {"steps": 2, "batch_size": 2, "sampling": sampling, "progress": False}
    model = load(directory)
    options |= {"output_dir": tmp_path / "run", "segments": "last"}
    run = align(model, rewards.motion_smoothness(), PROMPTS, **options)
    assert [row["frames"] for row in run.metrics] == [list(range(7))] * 2
    assert all(row["grad_norm"] > 0 for row in run.metrics)
    run.adapter.remove()
    options |= {"output_dir": tmp_path / "frames", "frames": "random:2"}
    run = align(model, rewards.brightness(), PROMPTS, **options)
    assert all(min(row["frames"]) >= 4 for row in run.metrics)  # of the last segment, which learns
    run.adapter.remove()
    options["output_dir"] = tmp_path / "none"
    with pytest.raises(ValueError, match=r"no scored frame \(of \[0, 3\]\) lies in the segments"):
        align(model, rewards.brightness(), PROMPTS, **options | {"frames": "0,3"})
    with pytest.raises(ValueError, match=r"segments='3' must lie in 1..2"):
        align(model, rewards.brightness(), PROMPTS, **options | {"segments": "3"})
    with pytest.raises(ValueError, match="write all, last, or numbers"):
        align(model, rewards.brightness(), PROMPTS, **options | {"segments": "first"})


def test_seams_and_drift_are_measured():
    still = torch.full((1, 7, 3, 8, 8), 0.5)
    jump, tint = still.clone(), still.clone()
    jump[:, 4:, :, :4] = 1.0  # at the seam of two segments of 4
    tint[:, 4:, 0] = 0.8
    kept = partial(metrics.measure, prompts=["a cat"], metrics=[], segment=4)
    scores = kept(torch.cat([still]))
    assert scores["seam consistency"] == 0 and scores["palette kept"] == 1
    assert kept(jump)["seam consistency"].item() == pytest.approx(-0.25)
    assert kept(jump[:, [0, 1, 4, 4, 4, 4, 4]])["seam consistency"] > 0  # a jump elsewhere
    assert kept(tint)["palette kept"] < 0.97
    assert "seam consistency" not in metrics.measure(still, ["a cat"], [])


def test_long_clips_are_evaluated(directory):
    model, sampling = load(directory), Sampling(**SETTINGS, extend=2)
    adapter = lora.add(model, rank=2)
    options = {"seeds_per_prompt": 1, "sampling": sampling, "progress": False}
    found = evaluate(model, adapter, rewards.brightness(), PROMPTS, **options)
    assert found.row("prompts", "seam consistency").difference == 0  # a fresh adapter does nothing
    assert found.row("prompts", "palette kept").base < 1
