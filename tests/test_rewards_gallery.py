"""The gallery tells the truth, weights are loaded from where it says, and rewards refuse what they cannot judge."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
)

from tests.test_rewards_clip import CONFIGS, write_clip
from vader_nb import hub, rewards
from vader_nb.rewards import conflict, parse, statistics
from vader_nb.rewards.gallery import CARDS, HEADINGS, SOURCES

# ---------------------------------------------------------------------------------------- the gallery


def test_every_reward_has_a_card_and_every_card_a_reward():
    assert set(CARDS) == set(rewards.NAMES)
    assert all(source in SOURCES for card in CARDS.values() for source in card.sources)


def test_it_shows_itself_as_text_and_as_html():
    table = rewards.table()
    assert all(name in repr(table) for name in rewards.NAMES)
    assert table._repr_html_().count("<tr>") == len(CARDS) + 1


def test_what_may_not_be_sold_is_marked():
    rows = {row[0]: row for row in rewards.table().rows}
    licenses = HEADINGS.index("license")
    assert "not for commercial use" in rows["action"][licenses]
    assert "not for commercial use" not in rows["hps"][licenses]


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("clip_score", lambda: CLIPModel(CONFIGS["openai/clip-vit-base-patch32"])),
        ("compression", lambda: vision_tower_and_head(463_553)),
        ("aesthetic", lambda: vision_tower_and_head(927_969)),
        ("rainy", lambda: vision_tower_and_head(927_969)),
        (
            "action",
            lambda: VideoMAEForVideoClassification(
                VideoMAEConfig(num_labels=400, use_mean_pooling=True)
            ),
        ),
    ],
)
def test_sizes_are_those_of_the_full_networks(name, build):
    with torch.device("meta"):
        network = build()
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(
        CARDS[name].parameters, abs=0.1
    )


def vision_tower_and_head(head: int) -> torch.nn.Module:
    large = CONFIGS["openai/clip-vit-large-patch14"].vision_config
    config = CLIPVisionConfig.from_dict(large.to_dict() | {"projection_dim": 768})
    tower = CLIPVisionModelWithProjection(config)
    tower.head = torch.nn.Parameter(torch.zeros(head))
    return tower


# --------------------------------------------------------------------------------------- where weights are


def test_weights_in_the_hubs_cache_are_found_offline(tmp_path):
    """HF_HOME as the hub's client fills it: a snapshot of the revision that `main` names."""
    repository = tmp_path / "hub" / "models--openai--clip-vit-base-patch32"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    write_clip(repository / "snapshots" / ("0" * 40))
    script = "from vader_nb import rewards; print(rewards.clip_score().clip.network.config.projection_dim)"
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert found.stdout.strip() == "16", found.stderr


def test_a_local_directory_must_be_a_whole_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        rewards.pickscore(tmp_path)
    from safetensors.torch import load_file, save_file

    write_clip(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if not k.startswith("visual_projection")}, tmp_path / "model.safetensors", {"format": "pt"})  # fmt: skip
    with pytest.raises(ValueError, match=r"lacks 1 tensors \(visual_projection.weight"):
        rewards.pickscore(tmp_path)


def test_a_pickle_that_would_run_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "touched").touch, ())

    torch.save({"state_dict": Evil()}, tmp_path / "head.pt")
    with pytest.raises(ValueError, match="head.pt cannot be read as a file of weights only"):
        rewards.rainy(tmp_path / "head.pt")
    assert not (tmp_path / "touched").exists()


def test_what_is_no_file_of_weights_is_named(tmp_path):
    (tmp_path / "page.pt").write_text("<html>404</html>")
    with pytest.raises(ValueError, match="page.pt cannot be read as a file of weights only"):
        rewards.rainy(tmp_path / "page.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="tensor.pt does not hold a state dict"):
        rewards.rainy(tmp_path / "tensor.pt")


def test_one_file_from_an_address_is_kept_where_torch_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    source = hub.Source(
        "https://example.org/head.pth", "head.pth", "1 kB", "MIT", local="elsewhere"
    )
    with pytest.raises(
        FileNotFoundError, match="(?s)not on this machine.*fetch https://example.org.*elsewhere"
    ):
        hub.single_file(source)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "head.pth").write_bytes(b"weights")
    assert hub.single_file(source).read_bytes() == b"weights"
    known = hub.Source("https://example.org/head.pth", "head.pth", "1 kB", "MIT", sha256="abc")
    with pytest.raises(ValueError, match=r"SHA-256 is [0-9a-f]{64}, not abc"):
        hub.single_file(known)


# ------------------------------------------------------------------------------------- what rewards refuse


@pytest.mark.parametrize(
    ("frames", "prompts", "told"),
    [
        (torch.zeros(1, 2, 3, 8, 8, dtype=torch.uint8), [""], "torch.uint8"),
        (torch.full((1, 2, 3, 8, 8), -1.0), [""], "-1 to -1"),
        (torch.full((1, 2, 3, 8, 8), 255.0), [""], "255"),
        (torch.full((1, 2, 3, 8, 8), float("nan")), [""], "nan"),
        (torch.zeros(1, 2, 3, 8, 8), [], "0 prompts"),
        (torch.zeros(2, 2, 3, 8, 8), ["a"], "2 clips .* 1 prompts"),
        (torch.zeros(2, 2, 3, 8, 8), "ab", "the string 'ab'"),
        (torch.zeros(2, 3, 8, 8), ["a", "b"], r"\(2, 3, 8, 8\)"),
        (torch.zeros(1, 3, 2, 8, 8), ["a"], r"\(1, 3, 2, 8, 8\)"),
    ],
)
@pytest.mark.parametrize("name", ["brightness", "hps", "a function"])
def test_what_no_reward_can_judge_is_named(name, frames, prompts, told):
    reward = (
        rewards.reward(lambda f, p: f.mean((1, 2, 3, 4)))
        if name == "a function"
        else parse(name, tiny=True)
    )
    with pytest.raises(ValueError, match=told):
        reward(frames, prompts)


# ------------------------------------------------------------------------------------------- composition


@pytest.fixture
def frames():
    return torch.rand(4, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1


PROMPTS = ["a"] * 4


def test_normalized_rewards_have_mean_0_and_spread_1_on_the_base_models_clips(frames):
    bright = rewards.brightness()
    normal = bright.normalized(*statistics(bright, frames, PROMPTS))
    scores = normal(frames, PROMPTS)
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std().item() == pytest.approx(1, abs=1e-4)
    assert (normal.unit, bright.unit) == ("std", "")
    with pytest.raises(ValueError, match="at least 2 clips"):
        statistics(bright, frames[:1], PROMPTS[:1])
    with pytest.raises(ValueError, match="got 0.0"):
        bright.normalized(0.5, 0.0)


def test_capped_is_refls_loss_from_below(frames):
    """ReFL: relu(2 - r). Capped at 2 the reward is 2 - relu(2 - r): the same gradient, and none above."""
    loud = 4 * rewards.brightness()
    leaf = frames.clone().requires_grad_()
    capped = loud.capped(2.0).scores(leaf, PROMPTS)
    torch.testing.assert_close(capped, 2 - torch.relu(2 - loud.scores(frames, PROMPTS)))
    capped.sum().backward()
    above = loud.scores(frames, PROMPTS) > 2
    assert above.any()
    assert (~above).any()
    assert not leaf.grad[above].any()
    assert leaf.grad[~above].all()


def test_conflict_is_the_cosine_of_the_pixel_gradients_clip_by_clip(frames):
    bright, color = rewards.brightness(), rewards.colorfulness()
    torch.testing.assert_close(conflict(bright, bright, frames, PROMPTS), torch.ones(4))
    torch.testing.assert_close(conflict(bright, -2 * bright, frames, PROMPTS), -torch.ones(4))
    leaf = frames.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(color(leaf, PROMPTS)[1], leaf)
    flat = gradient[1].flatten()
    expected = (
        flat.sum() / flat.norm() / flat.numel() ** 0.5
    )  # brightness has the same gradient on every pixel
    torch.testing.assert_close(conflict(color, bright, frames, PROMPTS)[1], expected)


def test_conflict_holds_on_large_frames_and_names_a_reward_without_gradient():
    """A cosine is a sum over all pixels: in float32 that of a reward with itself was 1.008 at 16 frames of 320 x 512."""
    large = torch.rand(1, 16, 3, 320, 512, generator=torch.Generator().manual_seed(0))
    for frames in (large, large.half()):
        same = conflict(rewards.brightness(), rewards.brightness(), frames, ["a"])
        torch.testing.assert_close(same, torch.ones(1), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="'flat' has no gradient"):
        conflict(
            rewards.brightness(),
            rewards.reward(lambda f, p: f.detach().mean((1, 2, 3, 4)), "flat"),
            large,
            ["a"],
        )


@pytest.mark.parametrize(
    "name", ["brightness", "colorfulness", "compressibility", "incompressibility"]
)
def test_formulas_take_half_precision_frames(name):
    """float16 is what a model decodes to on a GPU, and its largest number is 65,504."""
    leaf = (
        torch.rand(1, 1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
        .half()
        .requires_grad_()
    )
    score = parse(name)(leaf, ["a"])
    torch.testing.assert_close(score, parse(name)(leaf.detach().float(), ["a"]))
    score.sum().backward()
    assert leaf.grad.isfinite().all()
    assert parse(name).name == name


def test_expressions_know_the_methods_and_the_embedded_ones():
    parsed = parse("hps.capped(0.9) + 0.1 * aesthetic().normalized(6, 0.5)", tiny=True)
    assert [part.name for part in parsed.parts()] == ["hps", "aesthetic"]
    with pytest.raises(ValueError, match="unknown reward 'pretty'"):  # before anything is loaded
        parse("hps + pretty")
    with pytest.raises(FileNotFoundError, match="HPSv2"):
        parse("hps")
    with pytest.raises(ValueError, match="cannot read"):
        parse("brightness.to('cuda')")
    assert parse("brightness.normalized(mean=0.5, std=2)").name == "normalized brightness"
    for wrong in (
        "object_presence",
        "rainy()",
        "brightness.capped(0.9, foo=3)",
        "brightness.capped()",
    ):
        with pytest.raises(ValueError, match=r"in '.*' of the reward .*argument"):
            parse(wrong)


def test_rewards_are_listed_in_a_shell(capsys):
    from vader_nb.cli import main

    main(["rewards"])
    shown = capsys.readouterr().out
    assert re.search(r"hps\n +sees +frames, prompt\n", shown)
    assert "CC-BY-NC-4.0 (not for commercial use)" in shown
