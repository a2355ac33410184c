"""A little of everything, in an environment that need not have pytest: `python -m tests.smoke` (test_package.py)."""

import importlib
import pkgutil
import tempfile
from pathlib import Path

import torch

import vader_nb
from vader_nb import Sampling, align, evaluate, load, lora, prompts, rewards, sample
from vader_nb.zoo import oracles

FEW = Sampling(num_inference_steps=2)


def import_everything() -> int:
    """Import every module of the package, among them those that reach into the libraries."""
    names = [module.name for module in pkgutil.walk_packages(vader_nb.__path__, "vader_nb.")]
    for name in names:
        if not name.endswith("__main__"):
            importlib.import_module(name)
    return len(names)


def main(folder: Path) -> None:
    model = load("tiny")
    captions = prompts.get("tiny_held_out")[:2]
    clips = sample(model, captions, seeds=0)
    # What these weights make of this seed: a checkpoint that is read wrongly would make noise.
    graded = oracles.grade(clips, captions)
    assert graded["color and shape"].tolist() == [1, 1]
    assert graded["motion"].tolist() == [
        0,
        1,
    ]  # the first square does not shrink: the model is not perfect
    assert abs(clips.mean().item() - 0.5071) < 1e-3
    for name in ("aesthetic", "hps", "action"):
        assert getattr(rewards, name)("tiny")(clips, captions).isfinite().all(), name

    reward = rewards.hps("tiny")
    settings = {"steps": 2, "batch_size": 1, "sampling": FEW, "progress": False}
    run = align(model, reward, captions, output_dir=folder / "run", **settings)
    trained = {name: value.clone() for name, value in run.adapter.state_dict().items()}
    path = run.adapter.save(folder / "adapter.safetensors")
    run.adapter.remove()
    adapter = lora.load(model, path)
    for name, value in adapter.state_dict().items():
        assert torch.equal(value, trained[name]), name
    adapter.remove()
    groups = {"held-out": captions}
    evaluation = evaluate(model, path, reward, groups, sampling=FEW, progress=False)
    assert "hps" in str(evaluation)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
    print(import_everything(), "modules imported")
