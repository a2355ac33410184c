"""The comparison is paired, its intervals are honest, and it grades what can be graded."""

import pytest
import torch

from vader_nb import lora, rewards
from vader_nb.evaluate import evaluate, interval, motion, thumbnails

from .test_gradient import adapted

GROUPS = {"training": ["a red star", "a blue circle"], "held-out": ["a green square growing"] * 3}


def test_an_adapter_that_does_nothing_makes_no_difference(micro):
    adapter = lora.add(micro, rank=2)
    evaluation = evaluate(micro, adapter, rewards.brightness(), GROUPS, progress=False)
    assert {row.metric for row in evaluation.rows} == {"brightness", "motion", "diversity"}
    assert all(row.difference == row.low == row.high == 0 and not row.clear for row in evaluation.rows)
    assert evaluation.row("held-out", "motion").prompts == 3


def test_base_and_adapter_are_what_sampling_gives(micro):
    from vader_nb import sample

    adapter = adapted(micro)
    evaluation = evaluate(
        micro, adapter, rewards.brightness(), {"all": GROUPS["training"]}, seeds_per_prompt=1, seed=7, progress=False
    )
    prompts, base, after = evaluation.clips["all"]
    assert prompts == GROUPS["training"]
    torch.testing.assert_close(after, sample(micro, prompts, seeds=7, adapter=adapter))
    with adapter.disabled():
        torch.testing.assert_close(base, sample(micro, prompts, seeds=7))
    row = evaluation.row("all", "brightness")
    assert row.adapter - row.base == pytest.approx(row.difference, abs=1e-6)
    assert row.base == pytest.approx(base.mean().item(), abs=1e-5)
    assert "brightness" in str(evaluation)
    assert not any(r.metric == "diversity" for r in evaluation.rows)  # one seed has none


def test_oracles_join_in_for_captions_of_the_world(tiny):
    from vader_nb import Sampling

    adapter = lora.add(tiny, rank=1)
    try:
        captions = ["a red star moving left on a white background", "a blue circle growing on a black background"]
        evaluation = evaluate(
            tiny,
            adapter,
            rewards.brightness(),
            {"all": captions},
            sampling=Sampling(num_inference_steps=1),
            progress=False,
        )
    finally:
        adapter.remove()
    assert {"oracle: colour", "oracle: shape", "oracle: motion", "oracle: ground"} <= {
        r.metric for r in evaluation.rows
    }


def test_the_interval_covers_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        low, high = interval(0.3 + torch.randn(40, generator=generator))
        covered += low <= 0.3 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_motion_and_features():
    still = torch.full((1, 4, 3, 16, 16), 0.3)
    moving = still + torch.arange(4).view(1, 4, 1, 1, 1) * 0.1
    assert motion(still).item() == 0
    assert motion(moving).item() == pytest.approx(0.1, abs=1e-6)
    assert thumbnails(still).shape == (1, 4 * 3 * 8 * 8)
