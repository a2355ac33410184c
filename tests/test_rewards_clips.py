"""Learned judges of clips: DINOv2, VideoPrism. Parity with transformers, exact gradients, what each may see.

The networks are the real classes with few, random weights, written and read in the published layout.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torchvision.transforms.v2.functional import resize
from transformers import (
    AttentionInterface,
    AutoTokenizer,
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    LlavaOnevisionVideoProcessor,
    VideoPrismClipModel,
    VideoPrismConfig,
)

from tests.reward_contract import ascend, assert_slopes
from vader_nb.rewards import check, prism
from vader_nb.rewards.dino import subject_consistency
from vader_nb.rewards.gallery import CARDS, SOURCES
from vader_nb.rewards.prism import videoprism
from vader_nb.zoo import tokenizer

PROMPTS = ["a red star moving left on a gray background", "a blue circle growing", "dog"]
BUILDERS = {"dino": subject_consistency, "prism": videoprism}
PUBLISHED = {"dino": "dinov2-small", "prism": "videoprism-lvt-base"}
judges = pytest.mark.parametrize("name", BUILDERS)


def clips(batch=1, frames=4, height=36, width=36, seed=0):
    """Noise, a little blurred, away from 0 and 1; each frame a little more of another picture."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(batch, 2, 3, height // 2, width // 2, generator=generator)
    ends = resize(noise.flatten(0, 1), [height, width]).unflatten(0, (batch, 2))
    share = torch.linspace(0, 1, frames).view(1, -1, 1, 1, 1) if frames > 1 else 0.0
    return 0.1 + 0.8 * (ends[:, :1] * (1 - share) + ends[:, 1:] * share)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Where each checkpoint lies."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints")
    sizes = {"hidden_size": 16, "num_attention_heads": 2}
    config = Dinov2Config(
        **sizes, num_hidden_layers=2, image_size=28, patch_size=7, initializer_range=0.3
    )
    Dinov2Model(config).save_pretrained(folder / "dino")
    sizes |= {"intermediate_size": 32}
    layers = {"num_spatial_layers": 2, "num_temporal_layers": 1, "num_auxiliary_layers": 1}
    vision = {"image_size": 36, "tubelet_size": (1, 9, 9), "num_frames": 4}
    words = tokenizer.build()
    text = {"num_hidden_layers": 2, "vocab_size": len(words), "max_position_embeddings": 24}
    model = VideoPrismClipModel(
        VideoPrismConfig(vision_config=sizes | layers | vision, text_config=sizes | text)
    )
    for parameter in model.parameters():  # norms and queries begin as zeros
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder / "prism")
    tokenizer.save(folder / "prism")
    return folder


@pytest.fixture
def build(directories):
    return lambda name, **options: BUILDERS[name](directories / name, **options)


# ------------------------------------------------------------------------------------------- what both promise


def exact_attention(
    module, query, key, value, mask, dropout=0.0, scaling=None, softcap=None, **rest
):
    """VideoPrism's own, whose softmax is float32 whatever the weights are."""
    weights = query @ key.mT * (module.head_dim**-0.5 if scaling is None else scaling)
    weights = (weights / softcap).tanh() * softcap if softcap else weights
    weights = (weights if mask is None else weights + mask).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


@judges
def test_the_gradient_is_that_of_the_score(build, name):
    reward = build(name, dtype=torch.float64, **({"floor": 0.5} if name == "dino" else {}))
    if name == "prism":
        AttentionInterface.register("exact", exact_attention)
        reward.model.set_attn_implementation("exact")
    clip, margin = clips(height=36, width=36)[0].double(), (0, 0, 0, 0)
    if name == "dino":  # of 32 x 32 pixels 28 x 28 are seen
        clip, margin = clips(height=28, width=28)[0].double(), (2, 2, 2, 2)

    def padded(frames, prompts):
        return reward(F.pad(frames, margin, value=0.5), prompts)

    assert_slopes(padded, clip, PROMPTS[0], step=1e-6, rtol=1e-4, atol=1e-9)


@judges
def test_checkpointing_changes_no_gradient(build, name):
    """Plain autograd through the same networks, whose blocks keep all that they compute."""
    frames, gradients = clips(frames=6, height=48, width=40).double(), []
    for plain in (False, True):
        reward = build(name, dtype=torch.float64)
        if plain:
            reward.frames_at_once = 100
            for module in reward.model.modules():
                module.__dict__.pop("forward", None)
        leaf = frames.clone().requires_grad_()
        reward(leaf, PROMPTS[:1]).backward()
        gradients.append(leaf.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@judges
def test_every_block_is_checkpointed(build, name, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "vader_nb.rewards.networks.checkpoint",
        lambda f, *a, use_reentrant, **k: calls.append(f) or f(*a, **k),
    )
    build(name)(clips(frames=4).requires_grad_(), PROMPTS[:1])
    assert len(calls) == {"dino": 2, "prism": 4}[name]


@judges
def test_a_batch_scores_as_its_clips_one_by_one(build, name):
    reward, frames = build(name), clips(batch=3)
    together = reward(frames, PROMPTS)
    alone = torch.cat([reward(frames[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    assert together.shape == (3,) and together.std() > 1e-3
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@judges
def test_check_calls_it_fit_for_training(build, name):
    report = check(build(name), clips(batch=2, height=48, width=48), PROMPTS[:2])
    assert report.passed, report


@judges
def test_any_size_passes_a_gradient(build, name):
    reward = build(name)
    for size in ((48, 80), (160, 90), (20, 24)):
        frames = clips(2, 3, *size).requires_grad_()
        value = reward(frames, PROMPTS[:2])
        value.sum().backward()
        assert ((reward.range[0] <= value) & (value <= reward.range[1])).all()
        assert frames.grad.isfinite().all() and (frames.grad != 0).any()


@judges
def test_half_precision_agrees_and_weights_move(build, name):
    frames = clips(batch=2)
    exact = build(name)(frames, PROMPTS[:2])
    for reward in (build(name, dtype=torch.bfloat16), build(name).to(torch.bfloat16)):
        coarse = reward(frames, PROMPTS[:2])
        assert coarse.dtype == torch.float32 and reward.dtype == torch.bfloat16
        torch.testing.assert_close(coarse, exact, rtol=0, atol=0.02)  # of cosines
    assert not any(p.requires_grad for network in reward.networks for p in network.parameters())
    torch.testing.assert_close(
        build(name).to(torch.float64)(frames.double(), PROMPTS[:2]),
        exact.double(),
        rtol=0,
        atol=1e-5,
    )


@judges
def test_pixels_can_climb_the_reward(build, name):
    size = 0.02 if name == "prism" else 0.002  # a cosine near 1 is soon overshot
    before, after = ascend(build(name), clips(), PROMPTS[:1], steps=10, size=size)
    assert after > before + (0.05 if name == "prism" else 0.005)


@judges
def test_wrong_and_missing_weights_are_named(build, name, directories, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="'nobody-7b': choose one of published, .*-.*, or give"):
        BUILDERS[name]("nobody-7b")
    source = SOURCES[PUBLISHED[name]]
    # A revision that no cache on the machine which runs this test can have.
    monkeypatch.setitem(SOURCES, PUBLISHED[name], replace(source, revision="0" * 40))
    with pytest.raises(FileNotFoundError, match=f"(?s){source.repo}.*{source.size}.*checkpoint="):
        BUILDERS[name]()
    (tmp_path / "config.json").write_text((directories / name / "config.json").read_text())
    weights = load_file(directories / name / "model.safetensors")
    kept = {key: value for key, value in weights.items() if "layernorm" not in key}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks {len(weights) - len(kept)} tensors"):
        BUILDERS[name](tmp_path)


@judges
def test_published_configurations_have_the_published_sizes(name):
    with torch.device("meta"):
        reward = BUILDERS[name](from_config=True)
    count = sum(p.numel() for p in reward.model.parameters()) / 1e6
    assert count == pytest.approx(CARDS[reward.name.replace(" ", "_")].parameters, abs=0.05)
    # As listed for the published files: DINOv2's 88 MB and VideoPrism's 994 MB are float32.
    megabytes = int(SOURCES[PUBLISHED[name]].size.removesuffix(" MB"))
    assert count * 4 == pytest.approx(megabytes, rel=0.005)


# --------------------------------------------------------------------------------------- subject consistency


@torch.no_grad()
@pytest.mark.parametrize("size", [(90, 150), (31, 29), (300, 200)])
def test_dino_preprocesses_as_its_processor(build, size):
    """Of the published sizes, 256 and 224, and so of a small copy's."""
    reward, frames = build("dino"), clips(1, 2, *size)[0]
    for side, shorter in ((224, 256), (28, 32)):
        reward.model.config.image_size = side
        crop = {"size": {"shortest_edge": shorter}, "crop_size": {"height": side, "width": side}}
        statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
        processor = BitImageProcessor(do_rescale=False, **crop, **statistics)
        expected = processor(list(frames), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(reward.pixels(frames), expected, rtol=0, atol=1e-3)


@torch.no_grad()
def test_subject_consistency_is_the_cosine_of_dinos_vectors(build, directories):
    theirs, frames = Dinov2Model.from_pretrained(directories / "dino").eval(), clips(2, 5)
    pixels = build("dino").pixels(frames.flatten(0, 1))
    vectors = theirs(pixel_values=pixels).pooler_output.unflatten(0, (2, 5))

    def cosine(one, other):
        return torch.cosine_similarity(vectors[:, one], vectors[:, other], dim=-1)

    near = torch.stack([cosine(i, i + 1) for i in range(4)]).mean(0)
    first = torch.stack([cosine(0, i) for i in range(1, 5)]).mean(0)
    far = torch.stack([cosine(0, 3), cosine(1, 4)]).mean(0)
    assert (near - far).abs().max() > 0.01
    for options, expected in (({}, (near + first) / 2), ({"distance": 3}, far)):
        reward = build("dino", floor=0, **options)
        torch.testing.assert_close(reward(frames, ["", ""]), expected, rtol=0, atol=1e-5)
    curve = build("dino").curve(frames)
    torch.testing.assert_close(curve[:, [0, 2]], torch.stack([near, far], 1), rtol=0, atol=1e-5)
    assert curve.shape == (2, 4)


@torch.no_grad()
def test_a_frozen_clip_does_not_win(build):
    moving, frozen = clips(frames=6), clips(frames=1).expand(-1, 6, -1, -1, -1)
    free = build("dino", floor=0)
    assert free(frozen, [""]) > free(moving, [""])
    floored = build("dino")
    torch.testing.assert_close(floored(frozen, [""]), torch.zeros(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        floored(moving, [""]), free(moving, [""])
    )  # moves enough: no penalty
    change = moving.diff(dim=1).abs().mean().item()
    half = build("dino", floor=2 * change)(moving, [""])
    torch.testing.assert_close(half, free(moving, [""]) - 0.5, rtol=0, atol=1e-5)


def test_distances_are_named_and_checked(build):
    assert build("dino").name == "subject consistency"
    reward = build("dino", distance=4)
    assert reward.name == "subject consistency at 4"
    assert reward.fingerprint != build("dino", distance=3).fingerprint
    with pytest.raises(ValueError, match="at 4 needs at least 5 frames, got 4"):
        reward(clips(), [""])
    with pytest.raises(ValueError, match="distance=0 must be 1 frame or more"):
        build("dino", distance=0)
    with pytest.raises(ValueError, match="floor=-1, "):
        build("dino", floor=-1)


# ------------------------------------------------------------------------------------------------ videoprism


@torch.no_grad()
@pytest.mark.parametrize("size", [(90, 150), (288, 288), (40, 24)])
def test_videoprism_preprocesses_as_its_processor(build, size):
    reward, frames = build("prism"), clips(1, 4, *size)
    for side in (288, 36):
        reward.model.config.vision_config.image_size = side
        box = {"height": side, "width": side}
        processor = LlavaOnevisionVideoProcessor(size=box, do_normalize=False, do_rescale=False)
        expected = processor(list(frames), return_tensors="pt")["pixel_values_videos"]
        torch.testing.assert_close(reward.pixels(frames), expected, rtol=0, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    "count, chosen", [(1, [0] * 4), (3, [0, 0, 1, 2]), (4, [0, 1, 2, 3]), (10, [0, 2, 5, 7])]
)
def test_videoprism_is_the_models_own_similarity(build, directories, count, chosen):
    """The processor's frames, and log-probabilities over videos: similarities up to a shift per text."""
    frames, reward = clips(3, count), build("prism")
    theirs = VideoPrismClipModel.from_pretrained(directories / "prism").eval()
    words = AutoTokenizer.from_pretrained(directories / "prism")
    tokens = words(PROMPTS, padding="max_length", max_length=24, return_tensors="pt")
    output = theirs(pixel_values_videos=reward.pixels(frames[:, chosen]), **tokens)
    similarity = output.video_embeds @ output.text_embeds.T
    torch.testing.assert_close(reward(frames, PROMPTS), similarity.diagonal(), rtol=0, atol=1e-4)
    shifted = similarity - similarity.logsumexp(dim=0)
    torch.testing.assert_close(shifted, output.logits_per_video.log(), rtol=0, atol=1e-5)
    turned = reward(frames, PROMPTS[1:] + PROMPTS[:1])
    expected = torch.stack([similarity[0, 1], similarity[1, 2], similarity[2, 0]])
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-4)


def test_an_old_transformers_is_named(monkeypatch):
    monkeypatch.setattr(prism, "transformers", SimpleNamespace(__version__="5.12.0"))
    with pytest.raises(
        ImportError, match=r"transformers 5.24 has but 5.12.0, installed here, does not.*>=5.24"
    ):
        videoprism()


def test_long_prompts_are_cut_off(build):
    reward, long = build("prism"), " ".join(["a red star moving left"] * 20)
    first = reward(clips(), [long])
    assert torch.equal(first, reward(clips(), [long + " twice"])) and first.isfinite()
