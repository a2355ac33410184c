"""The way out: folders for other tools, their card, and the upload."""

import json

import pytest
import torch

from vader_nb import lora, publish
from vader_nb.cli import main
from vader_nb.models import TINY, load
from vader_nb.sampling import Sampling, sample

ADAPTER = TINY.parent / "tiny-adapters" / "hps.safetensors"
SHORT = Sampling(num_inference_steps=2, num_frames=2)
PROMPT = "a red star growing on a black background"


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


@pytest.fixture(scope="module")
def clip(tiny):
    return sample(tiny, PROMPT, sampling=SHORT, adapter=ADAPTER)


@pytest.mark.parametrize("format", [x for x in publish.FORMATS if x != "vader"])
def test_the_command_writes_what_acts_alike(tmp_path, tiny, clip, format, capsys):
    main(["export", str(ADAPTER), f"format={format}", f"output={tmp_path / 'out'}"])
    assert str(tmp_path / "out") in capsys.readouterr().out
    if format == "merged":
        made = sample(load(tmp_path / "out"), PROMPT, sampling=SHORT)
    else:
        file = "adapter.safetensors" if format in ("kohya", "comfyui") else ""
        made = sample(tiny, PROMPT, sampling=SHORT, adapter=tmp_path / "out" / file)
    torch.testing.assert_close(made, clip, rtol=0, atol=1e-6)
    assert "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_merged_adapter_has_its_scale(tmp_path, tiny):
    half = sample(tiny, PROMPT, sampling=SHORT, adapter={ADAPTER: 0.5})
    folder = publish.export(ADAPTER, tmp_path / "out", format="merged", scale=0.5)
    made = sample(load(folder), PROMPT, sampling=SHORT)
    torch.testing.assert_close(made, half, rtol=0, atol=1e-6)


@pytest.fixture
def run(tmp_path, tiny):
    """A run's folder with an evaluation in it."""
    folder = tmp_path / "run"
    adapter = lora.load(tiny, ADAPTER)
    adapter.save(folder / "adapter.safetensors", reward="hps | <b>", steps=40)
    adapter.remove()
    row = {"group": "held-out", "metric": "hps", "base": 0.8, "adapter": 0.9, "held_out": True}
    row |= {"difference": 0.1, "low": 0.05, "high": 0.15}
    rows = [row, row | {"metric": "a|b", "low": None, "high": None}, row | {"adapter": None}]
    (folder / "evaluation.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "clips").mkdir()
    (folder / "clips" / "group-1.gif").write_bytes(b"GIF89a")
    return folder


def test_the_card_tells_reward_steps_clips_and_table(run):
    folder = publish.export(run)
    assert folder == run / "diffusers"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "- steps: 40" in card and "- reward: hps | <b>" in card
    assert "| held-out | hps, not trained on | 0.800 | 0.900 | +0.100 (+0.050 to +0.150) |" in card
    assert r"a\|b" in card and card.count("held-out") == 2
    assert (folder / "before_after.gif").read_bytes() == b"GIF89a"


def test_a_folder_that_holds_something_is_left_alone(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("…", encoding="utf-8")
    with pytest.raises(FileExistsError, match="mine is not empty"):
        publish.export(run, tmp_path / "mine")
    with pytest.raises(ValueError, match="unknown format 'a1111'; choose one of diffusers"):
        publish.export(run, tmp_path / "new", format="a1111")
    assert not (tmp_path / "new").exists()


def test_the_upload_is_of_the_whole_folder(run, tmp_path, monkeypatch):
    """Up to the network: what huggingface_hub is asked to do."""
    asked = []
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(
            publish.HfApi, name, lambda self, *a, name=name, **k: asked.append((name, a, k))
        )
    folder = publish.export(run, tmp_path / "out", push_to_hub="me/mine", private=True)
    assert asked == [
        ("create_repo", ("me/mine",), {"private": True, "exist_ok": True}),
        ("upload_folder", (), {"repo_id": "me/mine", "folder_path": folder}),
    ]
