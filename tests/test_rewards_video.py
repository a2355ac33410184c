"""Rewards of whole clips: parity with transformers and torchvision, what each may see, exact gradients.

The networks are the real classes with few, random weights, written and read in the published layout.
"""

from dataclasses import replace
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.models.optical_flow import Raft_Small_Weights, raft_small
from torchvision.transforms.v2.functional import resize
from transformers import (
    AttentionInterface,
    AutoTokenizer,
    VideoMAEImageProcessor,
    VJEPA2Config,
    VJEPA2Model,
    VJEPA2VideoProcessor,
    XCLIPConfig,
    XCLIPModel,
    XCLIPProcessor,
)

from vader_nb.rewards import flow
from vader_nb.rewards.flow import flow_smoothness
from vader_nb.rewards.gallery import SOURCES
from vader_nb.rewards.vjepa import block_masks, temporal_consistency
from vader_nb.rewards.xclip import text_video
from vader_nb.zoo import tokenizer

PROMPTS = ["a red star moving left on a gray background", "a blue circle growing", "dog"]
VJEPA = {
    "crop_size": 64,
    "patch_size": 8,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "pred_hidden_size": 16,
    "pred_num_attention_heads": 2,
    "pred_num_hidden_layers": 2,
    "initializer_range": 0.3,  # so that what a layer does shows
    "pred_zero_init_mask_tokens": False,
}
BUILDERS = {"vjepa": temporal_consistency, "xclip": text_video, "raft": flow_smoothness}
rewards = pytest.mark.parametrize("name", BUILDERS)


def clips(batch=1, frames=4, height=32, width=32, dtype=torch.float32, seed=0):
    """Noise, a little blurred, away from 0 and 1."""
    noise = torch.rand(
        batch * frames, 3, height // 2, width // 2, generator=torch.Generator().manual_seed(seed)
    )
    return (0.1 + 0.8 * resize(noise, [height, width])).unflatten(0, (batch, frames)).to(dtype)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Where each checkpoint lies."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints")
    VJEPA2Model(VJEPA2Config(**VJEPA)).save_pretrained(folder / "vjepa")
    words = tokenizer.build()
    text = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "intermediate_size": 32,
        "max_position_embeddings": 24,
    }
    vision = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "image_size": 32,
        "patch_size": 8,
        "num_frames": 4,
    }
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    mit = {"mit_hidden_size": 16, "mit_intermediate_size": 32, "mit_num_attention_heads": 2}
    config = XCLIPConfig(
        text_config=text | layers,
        vision_config=vision | layers | mit | {"initializer_range": 0.3},
        projection_dim=16,
        prompt_num_attention_heads=2,
        prompt_alpha=1.0,
    )
    model = XCLIPModel(config)
    torch.nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=0.5)
    model.save_pretrained(folder / "xclip")
    tokenizer.save(folder / "xclip")
    torch.save(raft_small(weights=None).state_dict(), folder / "raft")
    return folder


@pytest.fixture
def build(directories, monkeypatch):
    """build(name, …) loads that reward. Here RAFT makes 2 updates, and its 12 where that matters."""
    monkeypatch.setattr(flow, "UPDATES", 2)
    return lambda name, **options: BUILDERS[name](directories / name, **options)


# ------------------------------------------------------------------------------------- what all three promise


@rewards
def test_the_gradient_is_that_of_the_score(build, name):
    reward = build(name, dtype=torch.float64)
    leaf = clips(
        frames=4 if name != "raft" else 3, height=32, width=32, dtype=torch.float64
    ).requires_grad_()
    reward(leaf, PROMPTS[:1]).sum().backward()
    gradient, step = (
        leaf.grad.flatten(),
        1e-7 if name == "raft" else 1e-5,
    )  # RAFT's ReLU and lookups have kinks
    places = torch.randperm(gradient.numel(), generator=torch.Generator().manual_seed(1))[:20]
    slopes = []
    for place in places:
        nudge = torch.zeros_like(gradient)
        nudge[place] = step
        with torch.no_grad():
            ahead, behind = (
                reward(leaf + side * nudge.view_as(leaf), PROMPTS[:1]) for side in (1, -1)
            )
        slopes.append((ahead - behind) / (2 * step))
    assert (gradient[places] != 0).sum() >= 10  # a crop leaves some pixels unseen
    torch.testing.assert_close(gradient[places], torch.cat(slopes), rtol=1e-4, atol=1e-9)


@rewards
def test_a_batch_scores_as_its_clips_one_by_one(build, name):
    reward, frames = build(name), clips(batch=3)
    together = reward(frames, PROMPTS)
    alone = torch.cat([reward(frames[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    assert together.shape == (3,) and together.std() > 0
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@rewards
def test_any_size_passes_a_gradient(build, name):
    reward = build(name)
    for size in ((48, 80), (80, 48), (320, 512)):
        frames = clips(
            frames=3 if name == "raft" else 2, height=size[0], width=size[1]
        ).requires_grad_()
        value = reward(frames, PROMPTS[:1])
        value.sum().backward()
        assert value.isfinite().all() and reward.range[0] <= value.item() <= reward.range[1]
        assert frames.grad.isfinite().all() and (frames.grad != 0).any()


@rewards
def test_bfloat16_agrees_within_two_percent(build, name):
    frames = clips(batch=2)
    exact = build(name)(frames, PROMPTS[:2])
    for reward in (build(name, dtype=torch.bfloat16), build(name).to(torch.bfloat16)):
        coarse = reward(frames, PROMPTS[:2])
        assert coarse.dtype == torch.float32
        scale = (
            torch.ones(2) if name == "xclip" else exact.abs()
        )  # a cosine crosses 0, its scale is 1
        assert ((coarse - exact).abs() <= 0.02 * scale).all()


@rewards
def test_pixels_can_climb_the_reward(build, name):
    reward, frames = build(name), clips()
    before = reward(frames, PROMPTS[:1]).item()
    for _ in range(5):
        leaf = frames.clone().requires_grad_()
        reward(leaf, PROMPTS[:1]).sum().backward()
        frames = (frames + 0.01 * leaf.grad.sign()).clamp(0, 1)
    assert reward(frames, PROMPTS[:1]).item() > before + 0.05 * abs(before)


@rewards
def test_networks_stay_frozen_and_move_their_memory_along(build, name):
    reward = build(name)
    frames = clips()
    before = reward(frames, PROMPTS[:1])
    torch.testing.assert_close(
        reward.to(torch.float64)(frames.double(), PROMPTS[:1]),
        before.double(),
        rtol=1e-4,
        atol=1e-5,
    )
    torch.testing.assert_close(reward.to(torch.float32)(frames, PROMPTS[:1]), before)
    assert not any(p.requires_grad for network in reward.networks for p in network.parameters())


@rewards
def test_unknown_checkpoints_are_named(name):
    with pytest.raises(ValueError, match="'nobody-7b': choose one of published, .*-.*, or give"):
        BUILDERS[name]("nobody-7b")


@pytest.mark.parametrize(
    "build, source", [(temporal_consistency, "vjepa2-vitl"), (text_video, "xclip-base-patch32")]
)
def test_offline_the_missing_weights_are_named(build, source, monkeypatch):
    # A revision that no cache on the machine which runs this test can have.
    monkeypatch.setitem(SOURCES, source, replace(SOURCES[source], revision="0" * 40))
    with pytest.raises(
        FileNotFoundError, match=f"(?s){SOURCES[source].repo}.*{SOURCES[source].size}.*checkpoint="
    ):
        build()


@pytest.mark.parametrize("name, part", [("vjepa", "predictor."), ("xclip", "mit.")])
def test_a_directory_that_lacks_weights_is_refused(directories, tmp_path, name, part):
    (tmp_path / "config.json").write_text((directories / name / "config.json").read_text())
    weights = load_file(directories / name / "model.safetensors")
    kept = {key: value for key, value in weights.items() if not key.startswith(part)}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError,
        match=rf"does not fit .*Model: it lacks {len(weights) - len(kept)} tensors \({part}",
    ):
        BUILDERS[name](tmp_path)


def test_published_configurations_have_the_published_sizes():
    with torch.device("meta"):
        models = VJEPA2Model(VJEPA2Config()), XCLIPModel(XCLIPConfig()), raft_small(weights=None)
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert counts[2] == Raft_Small_Weights.C_T_V2.meta["num_params"] == 990_162
    assert [round(count / 1e6, 1) for count in counts[:2]] == [326.0, 196.6]
    assert Raft_Small_Weights.C_T_V2.url == SOURCES["raft-small"].repo


# ------------------------------------------------------------------------------------- temporal consistency


@pytest.fixture
def vjepa(build):
    return build("vjepa")


@pytest.fixture
def theirs(directories):
    return VJEPA2Model.from_pretrained(directories / "vjepa").eval()


@torch.no_grad()
def test_vjepa_preprocesses_as_its_processor(vjepa):
    frames = clips(frames=2, height=90, width=150)
    processor = VJEPA2VideoProcessor(crop_size=64, do_rescale=False)
    expected = processor(list(frames), return_tensors="pt")["pixel_values_videos"]
    torch.testing.assert_close(vjepa.pixels(frames), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("frames", [2, 16])
def test_with_nothing_hidden_the_encoder_is_transformers_own(vjepa, theirs, frames):
    pixels = vjepa.pixels(clips(batch=2, frames=frames))
    tokens = vjepa.model.encoder.embeddings(pixels)
    ours = vjepa.encode(tokens, torch.arange(tokens.shape[1]))
    torch.testing.assert_close(
        ours, theirs(pixels, skip_predictor=True).last_hidden_state, rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_from_one_context_the_predictor_is_transformers_own(vjepa, theirs):
    pixels = vjepa.pixels(clips(batch=2))
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    visible, hidden = order[:50], order[50:90]  # neither sorted nor complete
    output = theirs(
        pixels, context_mask=[visible.expand(2, -1)], target_mask=[hidden.expand(2, -1)]
    )
    ours = vjepa.predict(output.last_hidden_state[:, visible], visible, hidden, token=1)
    torch.testing.assert_close(
        ours, output.predictor_output.last_hidden_state, rtol=1e-5, atol=1e-5
    )
    other = vjepa.predict(output.last_hidden_state[:, visible], visible, hidden, token=0)
    assert (other - ours).abs().max() > 0.01


@torch.no_grad()
def test_the_score_is_minus_vjepas_loss(vjepa, theirs):
    """Built from transformers alone: its encoder with an attention that looks at no hidden token gives the context."""
    frames = clips(batch=2)
    pixels, tokens, losses = vjepa.pixels(frames), theirs.predictor.embeddings.mask_tokens, []
    target = theirs(pixels, skip_predictor=True).last_hidden_state
    target = (target - target.mean(-1, keepdim=True)) / (
        target.var(-1, keepdim=True, unbiased=False) + 1e-5
    ).sqrt()
    trained = tokens.clone()
    for family, (_, hidden) in enumerate(block_masks(8)):
        unseen = torch.zeros(2, 64, dtype=torch.bool)
        unseen[:, hidden] = True

        def blinkered(module, query, key, value, mask, scaling, blind=unseen.flatten(), **options):
            weights = (
                (query @ key.transpose(-1, -2) * scaling).masked_fill(blind, -torch.inf).softmax(-1)
            )
            return (weights @ value).transpose(1, 2), weights

        AttentionInterface.register("blinkered", blinkered)
        theirs.set_attn_implementation("blinkered")
        features = theirs(pixels, skip_predictor=True).last_hidden_state
        theirs.set_attn_implementation("sdpa")
        tokens[1] = trained[family]  # transformers always takes the second
        seen, masked = (
            (unseen.flatten() == value).nonzero().T.expand(2, -1) for value in (False, True)
        )
        prediction = theirs.predictor(
            features, context_mask=[seen], target_mask=[masked]
        ).last_hidden_state
        losses.append((prediction - target[:, masked[0]]).abs().mean(dim=(1, 2)))
    torch.testing.assert_close(
        vjepa(frames, PROMPTS[:2]), -(losses[0] + losses[1]) / 2, rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_nothing_of_the_hidden_blocks_leaks_into_the_context(vjepa, theirs, monkeypatch):
    frames = clips(
        height=73, width=73
    )  # neither resized (64 * 256 / 224 = 73) nor stretched, but cropped by 4 at the top
    contexts, real = [], vjepa.predict
    monkeypatch.setattr(
        vjepa, "predict", lambda context, *rest: contexts.append(context) or real(context, *rest)
    )
    for family, (_, hidden) in enumerate(vjepa.masks):
        changed = frames.clone()
        for patch in hidden.tolist():
            top, left = 4 + patch // 8 * 8, 4 + patch % 8 * 8
            changed[..., top : top + 8, left : left + 8] = 0.5
        contexts.clear()
        before, after = vjepa(frames, PROMPTS[:1]), vjepa(changed, PROMPTS[:1])
        assert torch.equal(contexts[family], contexts[2 + family]) and before != after
        visible = torch.ones(2, 64, dtype=torch.bool)
        visible[:, hidden] = False
        full = [
            theirs(vjepa.pixels(f), skip_predictor=True).last_hidden_state
            for f in (frames, changed)
        ]
        leak = (full[0] - full[1])[:, visible.flatten()].abs().max()
        assert leak > 0.01  # transformers' own visible features do know


def test_masks_are_vjepas_blocks():
    shares = [[], []]
    for seed in range(50):
        for family, (visible, hidden) in enumerate(block_masks(16, seed)):
            assert torch.equal(torch.cat([visible, hidden]).sort().values, torch.arange(256))
            assert len(visible) and len(hidden)
            shares[family].append(len(hidden) / 256)
    # 8 blocks of 0.15 that fell anywhere, edges included, would hide 1 - 0.85^8 = 0.73; blocks do not cross the edge.
    assert 0.55 < torch.tensor(shares[0]).mean() < 0.75
    assert 0.75 < torch.tensor(shares[1]).mean() < 0.95
    same, again, other = block_masks(16), block_masks(16), block_masks(16, seed=1)
    assert torch.equal(same[0][0], again[0][0]) and not torch.equal(same[0][1], other[0][1])
    with pytest.raises(ValueError, match="1 x 1 patches is too coarse"):
        block_masks(1)


def test_one_block_of_the_mask_has_the_stated_area_and_aspect(monkeypatch):
    monkeypatch.setattr("vader_nb.rewards.vjepa.FAMILIES", ((1, 0.15), (1, 0.7)))
    aspects = []
    for seed in range(50):
        for (_, hidden), share in zip(block_masks(24, seed), (0.15, 0.7)):
            rows, columns = (hidden // 24).unique(), (hidden % 24).unique()
            assert len(rows) * len(columns) == len(hidden)  # a rectangle
            assert abs(len(hidden) / 576 - share) < 0.03
            aspects.append(len(rows) / len(columns))
    assert 0.7 < min(aspects) < 0.8 and 1.35 < max(aspects) < 1.6


def test_masks_change_with_the_seed_alone(build):
    frames = clips()
    assert build("vjepa")(frames, ["a"]) == build("vjepa", seed=0)(frames, ["b"])
    assert build("vjepa", seed=1)(frames, ["a"]) != build("vjepa")(frames, ["a"])


def test_a_mask_token_that_was_never_trained_is_not_used(vjepa):
    assert [vjepa.mask_token(family) for family in range(2)] == [0, 1]
    vjepa.model.predictor.embeddings.mask_tokens[1:] = 0  # as V-JEPA 2's training code leaves them
    assert [vjepa.mask_token(family) for family in range(2)] == [0, 0]


def test_vjepa_needs_whole_tubelets(vjepa):
    assert vjepa(clips(frames=16), PROMPTS[:1]).isfinite()
    with pytest.raises(
        ValueError, match=r"multiple of 2 frames, got 5: drop 1, as in frames\[:, :4\]"
    ):
        vjepa(clips(frames=5), PROMPTS[:1])
    with pytest.raises(ValueError, match="got 1: score more, or repeat the last one"):
        vjepa(clips(frames=1), PROMPTS[:1])


# ----------------------------------------------------------------------------------------------- text video


@pytest.fixture
def xclip(build):
    return build("xclip")


@torch.no_grad()
def reference(folder, frames, prompts):
    """X-CLIP's cosine of every clip with every prompt, by transformers' own model and processor."""
    model = XCLIPModel.from_pretrained(folder).eval()
    statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    pictures = VideoMAEImageProcessor(do_rescale=False, **statistics, **size)
    processor = XCLIPProcessor(pictures, AutoTokenizer.from_pretrained(folder))
    inputs = processor(
        text=prompts, videos=[list(clip) for clip in frames], return_tensors="pt", padding=True
    )
    return model(**inputs).logits_per_video / model.logit_scale.exp()


@torch.no_grad()
def test_text_video_is_xclips_own_cosine(xclip, directories):
    frames = clips(batch=3, height=48, width=80)
    scores = reference(directories / "xclip", frames, PROMPTS)
    assert (scores - scores.diagonal()[:, None]).abs().max() > 0.1  # a wrong pair would show
    torch.testing.assert_close(xclip(frames, PROMPTS), scores.diagonal(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_each_clip_is_judged_by_its_own_prompt(xclip, directories):
    frames = clips(batch=3)
    scores = reference(directories / "xclip", frames, PROMPTS)
    turned = xclip(frames, PROMPTS[1:] + PROMPTS[:1])
    torch.testing.assert_close(
        turned, torch.stack([scores[0, 1], scores[1, 2], scores[2, 0]]), rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "count, chosen", [(1, [0] * 4), (3, [0, 1, 1, 2]), (4, [0, 1, 2, 3]), (16, [2, 6, 10, 14])]
)
def test_text_video_takes_the_middles_of_equal_stretches(xclip, directories, count, chosen):
    frames = clips(frames=count)
    expected = reference(directories / "xclip", frames[:, chosen], PROMPTS[:1])[:, 0]
    torch.testing.assert_close(xclip(frames, PROMPTS[:1]), expected, rtol=1e-5, atol=1e-5)


def test_sentences_are_read_once_and_cut_off(xclip, monkeypatch):
    frames, long = clips(batch=2), " ".join(["a red star moving left"] * 20)
    calls, real = [], xclip.model.text_model.forward
    monkeypatch.setattr(
        xclip.model.text_model, "forward", lambda **given: calls.append(given) or real(**given)
    )
    first = xclip(frames, [long, long])
    assert torch.equal(first, xclip(frames, [long + " twice", long])) and [
        len(c["input_ids"]) for c in calls
    ] == [1, 1]
    xclip.to(torch.float32)
    assert not xclip.text_cache


# -------------------------------------------------------------------------------------------- flow smoothness


@pytest.fixture
def raft(directories):
    model = raft_small(weights=None)
    model.load_state_dict(torch.load(directories / "raft", weights_only=True))
    return model.eval()


@torch.no_grad()
def test_flow_is_torchvisions_own(directories, raft):
    """With all 12 updates, on frames of a size that RAFT takes as they are, through torchvision's own transforms."""
    frames = clips(frames=4, height=128, width=136)
    first, second = Raft_Small_Weights.C_T_V2.transforms()(frames[0, :-1], frames[0, 1:])
    expected = raft(first, second)[-1] / (128**2 + 136**2) ** 0.5
    reward = flow_smoothness(directories / "raft")
    torch.testing.assert_close(reward.flow(frames)[0], expected, rtol=1e-5, atol=1e-6)
    change = (expected[1:] - expected[:-1]).square().sum(1).sqrt().mean()
    torch.testing.assert_close(reward(frames, ["a"]), -change[None], rtol=1e-5, atol=1e-6)
    amount = expected.square().sum(1).sqrt().mean()
    floored = flow_smoothness(directories / "raft", floor=2 * amount.item())
    torch.testing.assert_close(
        floored(frames, ["a"]), -(change + amount)[None], rtol=1e-5, atol=1e-6
    )


@torch.no_grad()
def test_flow_of_resized_frames_is_in_diagonals_of_the_original(build, raft):
    """48 x 80 is shown as 128 x 216: a pixel there is 0.375 of one here downwards, 0.370 across."""
    frames, reward = clips(frames=3, height=48, width=80), build("raft")
    large = resize(frames.flatten(0, 1), [128, 216], antialias=True) * 2 - 1
    pixels = raft(large[:2], large[1:], num_flow_updates=2)[-1]
    expected = pixels * torch.tensor([80 / 216, 48 / 128])[:, None, None] / (48**2 + 80**2) ** 0.5
    torch.testing.assert_close(reward.flow(frames)[0], expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_frozen_clip_is_perfect_only_without_a_floor(build):
    frozen = clips(frames=1).expand(-1, 4, -1, -1, -1)
    amount = (
        build("raft").flow(frozen).norm(dim=2).mean()
    )  # of this random network's illusion of motion
    assert build("raft")(frozen, ["a"]) == 0
    torch.testing.assert_close(build("raft", floor=1.0)(frozen, ["a"]), amount[None] - 1)


def test_flow_keeps_float32_weights_and_no_comparisons(build):
    reward = build("raft", dtype=torch.float16)
    assert reward.dtype == reward.to(torch.bfloat16).dtype == torch.float32
    assert reward.to(device="cpu", dtype=torch.float64).dtype == torch.float64
    assert reward.to("cpu").dtype == torch.float64
    half = build("raft")(clips().half(), ["a"])
    torch.testing.assert_close(half, build("raft")(clips().half().float(), ["a"]))
    reward(clips().requires_grad_(), ["a"]).backward()
    assert reward.raft.corr_block.corr_pyramid == []


def test_flow_needs_three_frames_and_takes_sixteen(build):
    reward = build("raft")
    assert reward(clips(frames=16), ["a"]).shape == (1,)
    for count in (1, 2):
        with pytest.raises(ValueError, match=f"at least 3 frames, got {count}"):
            reward(clips(frames=count), ["a"])
    with pytest.raises(ValueError, match="floor .* got -1"):
        build("raft", floor=-1)


def test_wrong_flow_files_are_refused(tmp_path, monkeypatch):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth does not hold raft_small's weights"):
        flow_smoothness(tmp_path / "other.pth")

    def unreachable(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    with pytest.raises(
        FileNotFoundError, match=r"(?s)raft_small_C_T_V2-01064c6d.pth.*3\.8 MB.*flow_smoothness\("
    ):
        flow_smoothness()
    place = tmp_path / "hub" / "checkpoints" / "raft_small_C_T_V2-01064c6d.pth"
    torch.save(raft_small(weights=None).state_dict(), place)
    with pytest.raises(ValueError, match="SHA-256 is [0-9a-f]{64}, not 01064c6d"):
        flow_smoothness()
