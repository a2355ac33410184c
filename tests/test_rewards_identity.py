"""Which reward it is: fingerprints, copies; rewards from text and from files; networks from configurations."""

import subprocess
import sys

import pytest
import torch

from tests.test_rewards_clip import write_clip
from vader_nb import rewards
from vader_nb.memory_planner import FakeMode
from vader_nb.rewards import parse
from vader_nb.rewards.gallery import CARDS
from vader_nb.rewards.networks import default_dtype

FRAMES = torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------ fingerprints


def test_rewards_of_one_name_are_told_apart():
    bright = rewards.brightness()
    alike = [
        (rewards.hps("tiny"), rewards.hps("tiny", resize="pad")),
        (bright.normalized(0.5, 2.0), bright.normalized(0.5, 3.0)),
        (0.1 * bright, 0.10000001 * bright),
        (rewards.compressibility(50), rewards.compressibility(51)),
        (rewards.reward(lambda f, p: f.mean()), rewards.reward(lambda f, p: -f.mean())),
        (2 * (bright + bright), 2 * bright + bright),
    ]
    for first, second in alike:
        assert first.name == second.name
        assert first.fingerprint != second.fingerprint
    with torch.device("meta"):
        versions = [rewards.hps(name, from_config=True) for name in ("v2.0", "v2.1", "published")]
    prints = [rewards.hps("tiny").fingerprint, *(reward.fingerprint for reward in versions)]
    assert len(set(prints)) == 3
    assert prints[2] == prints[3]


def test_a_local_checkpoint_is_known_by_what_it_holds(tmp_path):
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
        write_clip(folder)
    prints = [rewards.clip_score(folder).fingerprint for folder in folders]
    assert prints[0] == prints[1]
    (folders[1] / "README.md").write_text("a card with another sentence")
    assert rewards.clip_score(folders[1]).fingerprint == prints[0]
    write_clip(folders[1], projection=8)
    assert rewards.clip_score(folders[1]).fingerprint != prints[0]


def test_a_function_that_holds_itself_or_something_that_comes_later_has_a_fingerprint():
    def recursive(depth):
        def halved(frames, prompts):
            share = halved(frames, prompts) if len(prompts) > depth else later
            return share * frames.mean(dim=(1, 2, 3, 4))

        found = rewards.reward(halved).fingerprint
        later = 0.5  # noqa: F841 (held by `halved`)
        return found

    assert recursive(1) == recursive(1) != recursive(2)


def test_held_values_count_in_a_functions_fingerprint():
    def dimmer(weight):
        return rewards.reward(lambda frames, prompts: -weight * frames.mean((1, 2, 3, 4)))

    assert dimmer(1).fingerprint == dimmer(1).fingerprint != dimmer(2).fingerprint


def test_another_process_agrees(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def green(frames, prompts, kinds={'a', 'b'}):\n"
        "    inner = lambda x: x[:, :, 1] if 'a' in {'a', 'b', 'c'} else x\n"
        "    return inner(frames).mean((1, 2, 3))\n"
    )
    expression = f"{tmp_path}/mine.py:green + 0.1 * hps.capped(0.3) + compressibility(60)"
    script = (
        f"from vader_nb.rewards import parse; print(parse({expression!r}, tiny=True).fingerprint)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout.strip() == parse(expression, tiny=True).fingerprint, found.stderr


def test_a_renamed_reward_is_a_copy_and_the_same_reward():
    bright = rewards.brightness()
    first, second = bright.renamed("A"), bright.renamed("B")
    assert [reward.name for reward in (bright, first, second)] == ["brightness", "A", "B"]
    assert bright.fingerprint == first.fingerprint == second.fingerprint


def test_a_mix_is_differentiable_where_its_parts_are():
    blind = rewards.reward(lambda f, p: f.detach().mean((1, 2, 3, 4)), differentiable=False)
    bright = rewards.brightness()
    assert (bright + bright).differentiable
    assert not (bright + 2 * blind.capped(1)).differentiable
    assert not rewards.check(lambda f, p: f.detach().mean((1, 2, 3, 4))).passed
    assert rewards.check(blind).passed


class Titled:
    """As `vader_nb.Prompt`: no str, but one inside."""

    def __init__(self, text):
        self.text = text

    def __str__(self):
        return self.text


@pytest.mark.parametrize("expression", ["hps", "action", "brightness + hps", "a function"])
def test_prompts_may_be_objects_that_print_as_their_text(expression):
    texts = ["a red star moving left", "a blue circle growing"]
    reward = parse(expression, tiny=True) if expression != "a function" else rewards.as_reward(
        lambda frames, prompts: frames.mean((1, 2, 3, 4)) * torch.tensor([len(p) for p in prompts])
    )  # fmt: skip
    prompts = [Titled(text) for text in texts]
    reward.check_prompts(prompts)
    torch.testing.assert_close(reward(FRAMES, prompts), reward(FRAMES, texts))


# --------------------------------------------------------------------------------------- functions of files


@pytest.fixture
def my_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(
        "def blueness(frames, prompts):\n    return frames[:, :, 2].mean(dim=(1, 2, 3))\n\n\n"
        "def channel(index):\n    return lambda frames, prompts: frames[:, :, index].mean((1, 2, 3))\n"
    )


def test_a_function_of_a_file_is_a_reward(my_file):
    blue, texts = FRAMES[:, :, 2].mean(dim=(1, 2, 3)), ["", ""]
    reward = parse("my_rewards.py:blueness")
    assert reward.name == "blueness"
    torch.testing.assert_close(reward(FRAMES, texts), blue)
    mixed = parse("2*my_rewards.py:blueness - ./my_rewards.py:channel(index=2).capped(9)")
    torch.testing.assert_close(mixed(FRAMES, texts), blue)


def test_a_file_or_function_that_is_not_there_is_named(my_file):
    with pytest.raises(FileNotFoundError, match=r"no file 'other.py' in .*, to load 'blueness'"):
        parse("hps + other.py:blueness", tiny=True)
    with pytest.raises(ValueError, match="my_rewards.py has no function 'red'; it has blueness"):
        parse("my_rewards.py:red")
    with pytest.raises(
        ValueError, match=r"in 'my_rewards.py:channel\(\)' of the reward .*argument"
    ):
        parse("my_rewards.py:channel()")


# ------------------------------------------------------------------------------- from configurations alone

ARGUMENTS = {"compression": ["head.pt"], "rainy": ["head.pt"], "snowy": ["head.pt"]}
ARGUMENTS |= {"object_presence": ["book"], "class_probability": ["daisy"]}
WITH_NETWORKS = [name for name in rewards.NAMES if CARDS[name].parameters]


@pytest.mark.parametrize("name", WITH_NETWORKS)
def test_published_networks_are_made_without_weights(name):
    with torch.device("meta"):
        options = {"fps": 8} if name == "video_reward" else {}
        reward = getattr(rewards, name)(*ARGUMENTS.get(name, []), from_config=True, **options)
    count = sum(p.numel() for network in reward.networks for p in network.parameters())
    for part in reward.parts():
        count += sum(tensor.numel() for layer in getattr(part, "layers", []) for tensor in layer)
    assert count / 1e6 == pytest.approx(CARDS[name].parameters, abs=0.1)


@pytest.mark.parametrize(
    "expression",
    ["hps + aesthetic", "action", "action('tiny', 'growing')", "text_video", "flow_smoothness"]
    + ["object_removal('cat')", "temporal_consistency", "brightness", "subject_consistency"]
    + ["videoprism", "video_reward(fps=8)", "class_probability('daisy')"],
)
def test_they_score_fake_frames(expression):
    """With shapes but no numbers, in the default dtype of the moment."""
    with FakeMode() as fake:
        fake.truth = False
        with default_dtype(torch.float16):
            reward = parse(expression, tiny=expression != "action", from_config=True)
        fake.truth = True
        frames = torch.zeros(1, 4, 3, 64, 64, requires_grad=True)
        reward(frames, ["a prompt"] if "hps" in expression else ["growing"]).sum().backward()
        kinds = {p.dtype for network in reward.networks for p in network.parameters()}
    assert kinds <= {torch.float32 if "flow" in expression else torch.float16}
    assert frames.grad.shape == frames.shape


def test_what_cannot_be_simulated_says_so():
    with pytest.raises(ValueError, match="'grounding-dino-tiny' cannot be simulated"):
        rewards.object_removal("book", "grounding-dino-tiny", from_config=True)
