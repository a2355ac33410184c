"""VideoReward: parity with Qwen2-VL under peft as VideoAlign runs it, the published layout, exact gradients."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize
from transformers import (
    AutoTokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLVideoProcessor,
)

from tests.reward_contract import ascend, tensor_shapes
from vader_nb.hub import Source
from vader_nb.rewards import check, parse, record_parts, video_align, video_reward
from vader_nb.rewards.gallery import CARDS, SOURCES
from vader_nb.zoo import tokenizer

PROMPTS = ["a red star moving left on a gray background", "a blue circle", "dog"]
TOKENS = ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INSTRUCTIONS = """
look at it {}
END
how it moves {}
END
it should be - {{text_prompt}}
rate it {}
END
"""
SETTINGS = {
    "data_config": {"fps": 2, "max_frame_pixels": 16 * 28 * 28},
    "peft_lora_config": {"lora_r": 4, "lora_alpha": 12, "use_rslora": False},
    "inference_config": {
        "VQ_mean": 0.1, "VQ_std": 0.5, "MQ_mean": -0.2, "MQ_std": 0.4, "TA_mean": 0.3, "TA_std": 0.6,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    monkeypatch.setattr(video_align, "LEAST_PIXELS", 4 * 28 * 28)


def clips(batch=1, frames=8, height=56, width=84, seed=0):
    """Noise, a little blurred, away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(batch * frames, 3, height // 2, width // 2, generator=generator)
    return (0.1 + 0.8 * resize(noise, [height, width])).unflatten(0, (batch, frames))


def as_saved(state: dict) -> dict:
    """Under the names of transformers 4.45, with which the published file was written."""
    return {
        key.replace("model.model.language_model.", "model.model.").replace(
            "model.model.visual.", "model.visual."
        ): value.contiguous()
        for key, value in state.items()
    }


def adapted(config: Qwen2VLConfig, settings: dict, outputs: int = 3):
    """VideoAlign's model in training: Qwen2-VL with a head, and LoRA on the language model's layers."""
    model = Qwen2VLForConditionalGeneration(config)
    model.rm_head = nn.Linear(config.text_config.hidden_size, outputs, bias=False)
    lora = settings["peft_lora_config"]
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in LAYERS
    ]
    return get_peft_model(
        model, LoraConfig(r=lora["lora_r"], lora_alpha=lora["lora_alpha"], target_modules=targets)
    )


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The directories of a small VideoReward and its Qwen2-VL, and peft's model."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("video-reward")
    words = len(tokenizer.build())
    text = {
        "vocab_size": words + 40,  # as Qwen's, the embedding has rows to spare before it is resized
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        "initializer_range": 0.3,
    }
    vision = {"depth": 2, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=text, vision_config=vision | {"initializer_range": 0.3})
    config.save_pretrained(root / "qwen")
    tokenizer.save(root / "qwen")
    config.text_config.vocab_size = words + 3
    model = adapted(config, SETTINGS).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "bias" in name:  # which begin as zeros
            nn.init.normal_(parameter, std=0.2)
    (root / "judge" / "checkpoint-20").mkdir(parents=True)
    torch.save(as_saved(model.state_dict()), root / "judge" / "checkpoint-20" / "model.pth")
    (root / "judge" / "checkpoint-3").mkdir()
    (root / "judge" / "checkpoint-3" / "model.pth").write_bytes(b"an older one")
    (root / "judge" / "model_config.json").write_text(json.dumps(SETTINGS))
    (root / "judge" / "prompt_template.py").write_text(
        f"DETAILED_PROMPT_WITH_SPECIAL_TOKEN = {INSTRUCTIONS.format(*TOKENS)!r}\nraise SystemExit"
    )
    return root, model


@pytest.fixture
def build(published):
    root = published[0]
    return lambda **options: video_reward(
        root / "judge", base=root / "qwen", **({"fps": 4} | options)
    )


@torch.no_grad()
def reference(published, frames, prompts):
    """VideoAlign's forward on peft's model, not merged: one padded batch, processor and tokenizer whole."""
    root, model = published
    words = AutoTokenizer.from_pretrained(root / "qwen")
    words.add_tokens([*TOKENS, "<|video_pad|>"], special_tokens=True)
    special = words.convert_tokens_to_ids([*TOKENS, "<|video_pad|>"])
    processor = Qwen2VLVideoProcessor(
        size={"shortest_edge": 4 * 784, "longest_edge": 16 * 784},
        do_rescale=False,
        cap_pixels_per_frame=False,
    )
    seen = processor(videos=[*frames], return_tensors="pt")
    count = seen["video_grid_thw"][0].prod().item() // 4
    texts = [
        video_align.CHAT[0] + "<|video_pad|>" * count + video_align.CHAT[1]
        + INSTRUCTIONS.format(*TOKENS).format(text_prompt=prompt) + "<|im_end|>\n<|im_start|>assistant\n"
        for prompt in prompts
    ]  # fmt: skip
    ids = [
        words(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0] for text in texts
    ]
    ids = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    qwen = model.base_model.model.model
    is_video = ids == special[3]
    embedded = qwen.language_model.embed_tokens(ids.masked_fill(is_video, 0))
    video = qwen.visual(seen["pixel_values_videos"], grid_thw=seen["video_grid_thw"]).pooler_output
    embedded = embedded.masked_scatter(is_video[..., None].expand_as(embedded), video)
    states = qwen.language_model(inputs_embeds=embedded).last_hidden_state
    logits = model.base_model.model.rm_head(states)
    is_asked = (ids[..., None] == torch.tensor(special[:3])).any(-1)
    return logits[is_asked].view(len(prompts), 3, 3).diagonal(dim1=1, dim2=2)


def test_the_scores_are_those_of_videoaligns_forward(build, published):
    frames, scale = clips(batch=3), SETTINGS["inference_config"]
    raw = reference(published, frames[:, [0, 2, 5, 7]], PROMPTS)
    assert raw.std(dim=0).min() > 0.01  # clips and prompts matter
    expected = torch.stack(
        [
            (raw[:, i] - scale[f"{d}_mean"]) / scale[f"{d}_std"]
            for i, d in enumerate(("VQ", "MQ", "TA"))
        ]
    )
    reward = build()
    with torch.no_grad():
        torch.testing.assert_close(reward(frames, PROMPTS), expected.sum(0), rtol=0, atol=1e-3)
        weighted = build(vq=0.5, mq=0, ta=-2)
        assert [part.name for part in weighted.parts()] == ["visual quality", "text alignment"]
        with record_parts() as parts:
            total = (3 * weighted + 1)(frames, PROMPTS)
        torch.testing.assert_close(
            total, 1 + 1.5 * expected[0] - 6 * expected[2], rtol=0, atol=5e-3
        )
        assert list(parts) == ["visual quality", "text alignment"]
        torch.testing.assert_close(parts["text alignment"][0][:, 0], expected[2], rtol=0, atol=1e-3)
        for part, values in zip(reward.parts(), expected):
            torch.testing.assert_close(part(frames, PROMPTS), values, rtol=0, atol=1e-3)
    alone = build(mq=1, vq=0, ta=0)
    assert alone.name == "motion quality" and alone.parts() == [alone]
    assert alone.fingerprint == reward.parts()[1].fingerprint != reward.fingerprint


@torch.no_grad()
@pytest.mark.parametrize("size", [(56, 84), (40, 200), (300, 500)])
def test_pixels_are_the_processors_and_nearly_videoaligns(build, size):
    frames = clips(1, 4, *size)
    judge = build(fps=2)
    patches, places = judge.patches(frames)
    box = {"shortest_edge": 4 * 784, "longest_edge": 16 * 784}
    processor = Qwen2VLVideoProcessor(size=box, do_rescale=False, cap_pixels_per_frame=False)
    theirs = processor(videos=[frames[0]], return_tensors="pt")
    grid = theirs["video_grid_thw"][0].tolist()
    assert [*patches.shape[:3]] == [1, grid[0], grid[1] * grid[2]] and len(places) == grid[
        1
    ] * grid[2]
    pixels = theirs["pixel_values_videos"]
    torch.testing.assert_close(patches.flatten(0, 2), pixels, rtol=0, atol=1e-3)
    # VideoAlign resizes 8-bit frames, which rounds, and then lets the processor scale them.
    bytes_ = (frames[0] * 255).round().to(torch.uint8)
    target = [14 * side for side in grid[1:]]
    small = resize(bytes_, target, InterpolationMode.BICUBIC, antialias=True).float()
    scaled = Qwen2VLVideoProcessor(size=box, cap_pixels_per_frame=False)
    expected = scaled(videos=[small], return_tensors="pt")["pixel_values_videos"]
    torch.testing.assert_close(patches.flatten(0, 2), expected, rtol=0, atol=2 / 255 / 0.26)


@pytest.mark.parametrize(
    "count, fps, seen",
    [
        (16, 8, [0, 5, 10, 15]),  # 2 seconds
        (81, 16, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),  # 5 seconds
        (81, 64, [0, 27, 53, 80]),  # four at least
        (7, 1, [0, 1, 2, 4, 5, 6]),  # no more than there are, an even number
        (2, 8, [0, 1]),
    ],
)
def test_two_frames_a_second_are_seen_and_get_a_gradient(build, count, fps, seen):
    reward = build(fps=fps)
    assert reward.chosen(count).tolist() == seen
    frames = clips(frames=count).requires_grad_()
    reward(frames, PROMPTS[:1]).backward()
    assert frames.grad.isfinite().all()
    assert (frames.grad != 0).flatten(2).any(2)[0].nonzero().flatten().tolist() == seen


def test_checkpointing_changes_no_gradient(build):
    frames, gradients = clips(batch=2, frames=12).double(), []
    for plain in (False, True):
        reward = build(dtype=torch.float64)
        if plain:
            reward.frames_at_once = 100
            for module in reward.networks[0].modules():
                module.__dict__.pop("forward", None)
        leaf = frames.clone().requires_grad_()
        reward(leaf, PROMPTS[:2]).sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0].abs().max() > 1e-4
    # Norms and rotations are float32 inside whatever the weights are.
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6 * gradients[1].abs().max().item())


def test_it_is_fit_for_training_and_can_be_climbed(build):
    report = check(build(), clips(batch=2), PROMPTS[:2])
    assert report.passed, report
    before, after = ascend(build(), clips(), PROMPTS[:1], steps=5)
    assert after > before + 0.1


@torch.no_grad()
def test_a_batch_scores_as_its_clips_one_by_one(build):
    reward, frames = build(), clips(batch=3)
    together = reward(frames, PROMPTS)
    alone = torch.cat([reward(frames[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert together.std() > 0.01


@torch.no_grad()
def test_bfloat16_is_near_and_weights_move(build):
    frames = clips()
    exact = build()(frames, PROMPTS[:1])
    for reward in (build(dtype=torch.bfloat16), build().to(torch.bfloat16)):
        assert {p.dtype for p in reward.networks[0].parameters()} == {torch.bfloat16}
        torch.testing.assert_close(reward(frames, PROMPTS[:1]), exact, rtol=0, atol=0.3)
    assert not any(p.requires_grad for p in reward.networks[0].parameters())


def test_the_published_file_has_1123_tensors_that_fill_the_network():
    with torch.device("meta"):
        reward = video_reward(fps=8, from_config=True)
        settings = SOURCES["video-reward"].config
        config = Qwen2VLConfig(**SOURCES["qwen2-vl-2b"].config)
        state = as_saved(adapted(config, settings).state_dict())
        assert len(state) == 1123
        loaded = video_align.merged(state, 2.0, torch.bfloat16)
    shapes = tensor_shapes(reward.networks[0])
    assert {name: tuple(value.shape) for name, value in loaded.items()} == shapes
    count = sum(math.prod(shape) for shape in shapes.values()) / 1e6
    assert count == pytest.approx(CARDS["video_reward"].parameters, abs=0.05)
    # torch.save's own bytes, some 290 a tensor, are the rest of the published 5,031,072,529.
    size = sum(2 * value.numel() for value in state.values())
    assert 0 < 5_031_072_529 - size < 1123 * 400


def test_one_output_is_read_at_all_three_tokens(published, tmp_path, build):
    """VideoAlign's other form of head; its rows here are those of the first dimension."""
    root = published[0]
    state = torch.load(root / "judge" / "checkpoint-20" / "model.pth", weights_only=True)
    state["base_model.model.rm_head.weight"] = state["base_model.model.rm_head.weight"][:1]
    copy_of(root / "judge", tmp_path, state)
    reward = video_reward(tmp_path, base=root / "qwen", fps=4)
    frames = clips()
    first = build().dimensions(frames, PROMPTS[:1])
    other = reward.dimensions(frames, PROMPTS[:1])
    torch.testing.assert_close(other["VQ"], first["VQ"])
    assert torch.cat([*other.values()]).unique().numel() == 3


def copy_of(folder: Path, target: Path, state: dict) -> None:
    for name in ("model_config.json", "prompt_template.py"):
        (target / name).write_text((folder / name).read_text())
    (target / "checkpoint-1").mkdir()
    torch.save(state, target / "checkpoint-1" / "model.pth")


def test_what_does_not_fit_is_named(published, tmp_path, build):
    root = published[0]
    state = torch.load(root / "judge" / "checkpoint-20" / "model.pth", weights_only=True)
    with pytest.raises(FileNotFoundError, match=r"has no checkpoint-\*/model.pth"):
        video_reward(tmp_path, base=root / "qwen", fps=4)
    lost = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    copy_of(root / "judge", tmp_path, {k: v for k, v in state.items() if k != lost})
    with pytest.raises(ValueError, match=f"VideoReward's weights .*: it lacks '{lost}'"):
        video_reward(tmp_path, base=root / "qwen", fps=4)
    lost = "base_model.model.visual.merger.ln_q.weight"
    torch.save(
        {k: v for k, v in state.items() if k != lost}, tmp_path / "checkpoint-1" / "model.pth"
    )
    with pytest.raises(ValueError, match=r'(?s)Missing key.*"model.visual.merger.ln_q.weight"'):
        video_reward(tmp_path, base=root / "qwen", fps=4)
    embedding = "base_model.model.model.embed_tokens.weight"
    small = {embedding: state[embedding][:-1]}
    torch.save(state | small, tmp_path / "checkpoint-1" / "model.pth")
    with pytest.raises(ValueError, match=r"qwen has \d+ tokens, more than the \d+ of .*model.pth"):
        video_reward(tmp_path, base=root / "qwen", fps=4)
    (tmp_path / "prompt_template.py").write_text("SIMPLE_PROMPT = 'rate it'")
    with pytest.raises(ValueError, match="prompt_template.py has no DETAILED_PROMPT"):
        video_reward(tmp_path, base=root / "qwen", fps=4)


def test_settings_that_cannot_be_are_refused(build):
    for fps in (0, -8, math.inf):
        with pytest.raises(ValueError, match=f"fps={fps} must be a positive number"):
            build(fps=fps)
    with pytest.raises(ValueError, match="all 0"):
        build(vq=0, mq=0, ta=0)
    with pytest.raises(ValueError, match="fps"):
        parse("video_reward")
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        build()(clips(frames=1), PROMPTS[:1])
    with pytest.raises(ValueError, match="unknown checkpoint 'nobody-7b'"):
        video_reward("nobody-7b", fps=8)


def test_offline_the_missing_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    nowhere = Source("Qwen/nowhere", size="11 MB", local="base='/path'")
    monkeypatch.setitem(SOURCES, "qwen2-vl-2b", nowhere)
    with pytest.raises(FileNotFoundError, match="(?s)Qwen/nowhere.*base='/path'"):
        video_reward(fps=8)
