"""The action reward on a VideoMAE of random weights, with labels as Kinetics-400 names them."""

import gc
import weakref

import pytest
import torch
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from tests.reward_contract import ascend, assert_slopes
from vader_nb import rewards
from vader_nb.memory_planner import MemoryTracker
from vader_nb.rewards.networks import IMAGENET_MEAN, IMAGENET_STD, preprocess

LABELS = [
    "playing guitar",
    "playing piano",
    "eating watermelon",
    "passing American football (in game)",
    "piano",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videomae")
    config = VideoMAEConfig(
        image_size=32,
        patch_size=8,
        num_frames=4,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        use_mean_pooling=True,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    torch.manual_seed(0)
    model = VideoMAEForVideoClassification(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.05)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def action(folder):
    return rewards.action(folder)


PROMPTS = ["playing guitar", "A raccoon is eating watermelon.", "two cats playing the piano"]


@pytest.fixture(scope="module")
def clips():
    return torch.rand(3, 4, 3, 20, 36, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05


@pytest.mark.parametrize("count", [2, 4, 16])
def test_any_even_number_of_frames_is_what_from_pretrained_would_build(folder, action, count):
    """VADER's way: from_pretrained(num_frames=…). And the classifier is its own again afterwards."""
    clip = torch.rand(1, count, 3, 20, 36, generator=torch.Generator().manual_seed(1))
    model = VideoMAEForVideoClassification.from_pretrained(folder, num_frames=count).eval()
    pixels = preprocess(clip[0], 32, IMAGENET_MEAN, IMAGENET_STD)[None]
    with torch.no_grad():
        expected = model(pixels).logits.log_softmax(-1)[:, 0]
    torch.testing.assert_close(action(clip, ["playing guitar"]), expected, rtol=1e-5, atol=1e-5)
    assert action.classifier.videomae.embeddings.position_embeddings.shape[1] == 4 * 4 * 2


def test_an_odd_frame_is_filled_up_with_itself(action):
    clip = torch.rand(1, 5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    filled = torch.cat([clip, clip[:, -1:]], dim=1)
    torch.testing.assert_close(action(clip, PROMPTS[:1]), action(filled, PROMPTS[:1]))


@pytest.mark.parametrize(
    ("prompt", "label"),
    [
        ("Piano", "piano"),  # exactly
        (
            "she is  Playing PIANO, loudly",
            "playing piano",
        ),  # the longest inside, whatever the case and the commas
        ("a cat is playing the guitar", "playing guitar"),  # its words, in order
        ("passing american football (in game)", "passing American football (in game)"),
        ("a grand piano", "piano"),
    ],
)
def test_prompts_name_labels(action, prompt, label):
    assert action.index(prompt) == LABELS.index(label)


def test_a_prompt_without_an_action_is_answered_with_the_nearest_and_the_way_out(action):
    with pytest.raises(
        ValueError, match=r"'a cat plays guitars'.*nearest are playing guitar.*action\(label="
    ):
        action.index("a cat plays guitars")


def test_each_clip_is_judged_by_its_own_prompt_alone_as_together(action, clips):
    together = action(clips, PROMPTS)
    alone = torch.cat([action(clips[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    others = action(clips, [PROMPTS[0], PROMPTS[2], PROMPTS[2]])
    assert (others - together)[1].abs() > 1e-3
    torch.testing.assert_close(others[[0, 2]], together[[0, 2]])


def test_gradients_are_finite_differences(folder, clips):
    assert_slopes(rewards.action(folder, dtype=torch.float64), clips[0].double(), PROMPTS[0])


def test_bfloat16_is_within_two_percent(folder, action, clips):
    half = rewards.action(folder, dtype=torch.bfloat16)(clips, PROMPTS)
    assert half.dtype == torch.float32
    exact = action(clips, PROMPTS)
    assert (half - exact).abs().max() <= 0.02 * exact.abs().max()


def test_climbing_on_the_pixels_raises_it_within_20_steps(action, clips):
    before, after = ascend(action, clips, PROMPTS)
    assert (after > before).all()


def test_checkpointing_its_blocks_keeps_less_than_the_plain_network(folder):
    """At real proportions of depth: twelve layers."""
    config = VideoMAEConfig(
        image_size=64, num_frames=8, hidden_size=48, intermediate_size=192, num_attention_heads=3
    )
    torch.manual_seed(0)
    network = VideoMAEForVideoClassification(config).eval()
    clip = torch.rand(1, 8, 3, 64, 64, requires_grad=True)
    with MemoryTracker() as plain:
        network(clip).logits.sum().backward()
    from vader_nb.rewards.networks import checkpoint_blocks

    checkpoint_blocks(network.videomae.encoder.layer)
    with MemoryTracker() as checkpointed:
        network(clip).logits.sum().backward()
    assert checkpointed.bytes < plain.bytes / 3


def test_nothing_is_held_once_it_is_let_go(folder, clips):
    reward = rewards.action(folder)
    reward(clips.clone().requires_grad_(), PROMPTS).sum().backward()
    weight = weakref.ref(next(reward.classifier.parameters()))
    del reward
    gc.collect()
    assert weight() is None
