"""Choose a checkpoint: the one that scores highest on a reward that was not trained on.

choice = best_checkpoint("runs/mine", model, pick(), prompts.get("tiny_held_out")[::8])
print(choice.verdict)          the training reward still rises; the held-out reward has fallen since step 120
adapter = lora.load(model, choice.path)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch

from .checkpoints import list_checkpoints, read_metrics
from .evaluation import BASE, evaluate
from .models import VideoModel
from .rewards import Reward, as_reward
from .stats import MIN_PROMPTS, simultaneous_intervals

ORANGE = "#d97706"


@dataclass
class Point:
    """A checkpoint and its scores, or the base model, which is step 0 and has no path."""

    step: int
    path: Path | None
    # Of the reward that was trained on: mean over the same prompts and seeds, or over the training batches
    # since the checkpoint before, if recorded.
    reward: float | None
    held_out: float  # mean over prompts and seeds
    difference: float  # mean paired difference from the best checkpoint
    low: float  # its 95% interval, for all checkpoints together
    high: float


@dataclass
class Choice:
    """The result of `best_checkpoint`: shows itself as a table, and as a plot."""

    points: list[Point]  # the base model, then all checkpoints
    best: Point
    verdict: str  # what the intervals show, in one sentence
    reward: str  # name of the held-out reward
    prompts: int  # their number
    same: bool = False  # the trained reward was scored on these prompts, too

    @property
    def step(self) -> int:
        return self.best.step

    @property
    def path(self) -> Path | None:
        return self.best.path

    def __str__(self) -> str:
        head = f"difference from step {self.step} [95% interval]"
        lines = [f"{'step':>6} {'training':>9} {'held-out':>9}  {head}"]
        for point in self.points:
            training = "" if point.reward is None else f"{point.reward:.4f}"
            difference = f"{point.difference:+.4f} [{point.low:+.4f}, {point.high:+.4f}]"
            if point is self.best:
                difference = "the best"
            lines.append(f"{point.step:>6} {training:>9} {point.held_out:9.4f}  {difference}")
        return "\n".join([*lines, f"held-out: {self.reward}, {self.prompts} prompts", self.verdict])

    __repr__ = __str__

    def plot(self):
        """Draw the trained reward over steps, and how far the held-out one lies from the best checkpoint's, as a
        matplotlib Figure.

        A checkpoint is significantly worse than the best one where its whole interval lies below zero.
        """
        from matplotlib.figure import Figure

        best, columns = self.best, zip(*map(astuple, self.points))
        steps, _, rewards, _, difference, low, high = (np.array(c) for c in columns)
        figure = Figure(figsize=(6, 4.5), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        above.plot(steps, rewards.astype(float), "o-", color="#3b82c4", markersize=4)
        above.set(ylabel="training reward\n(" + ("same prompts" if self.same else "batches") + ")")
        below.axhline(0, color="gray", linestyle=":", linewidth=1)
        others = steps != best.step
        reach = (difference - low)[others], (high - difference)[others]
        bars = {"fmt": "o", "markersize": 4, "capsize": 3, "color": ORANGE}
        below.errorbar(steps[others], difference[others], reach, **bars)
        below.plot(best.step, 0, "*", color=ORANGE, markersize=15, label=f"best: step {best.step}")
        below.set(ylabel=f"held out: {self.reward},\ndifference from the best", xlabel="step")
        below.legend()
        return figure


def best_checkpoint(
    run_folder: str | Path,
    model: VideoModel,
    held_out: Reward | Callable,
    prompts: str | Path | Sequence[str],
    trained: Reward | Callable | None = None,
    **options,
) -> Choice:
    """Score the base and every checkpoint of a run with a reward that was not trained on.

    All are sampled at the same prompts and seeds: k checkpoints cost k + 1 samplings.

    Args:
        run_folder: Folder of the run.
        model: The model. Afterwards it carries the adapter that it carried before.
        held_out: A reward that was not trained on.
        prompts: A list, the name of a set, or a file; preferably prompts that were not trained on.
        trained: The reward that was trained on, to be scored on the same clips; the recorded rewards of the
            training batches differ in their prompts.
        **options: `seeds_per_prompt`, `batch_size`, `sampling`, `seed`, `progress` of `evaluate`.

    Raises:
        FileNotFoundError: The folder holds no checkpoint.
    """
    folder, held_out = Path(run_folder), as_reward(held_out)
    paths = list_checkpoints(folder)
    if not paths:
        raise FileNotFoundError(
            f"no checkpoint in {folder / 'checkpoints'}: is this a run's folder?"
        )
    adapters = {str(step): path for step, path in paths.items()}
    evaluation = evaluate(
        model,
        adapters,
        [] if trained is None else [trained],
        {"held-out": prompts},
        held_out=[held_out],
        keep=1,
        **options,
    )
    scores = evaluation.scores["held-out"]
    columns = [scores[name][held_out.name].double().mean(0) for name in (BASE, *adapters)]
    recorded = {row["step"]: row["reward"] for row in read_metrics(folder) if "reward" in row}
    choice = choose({0: None, **paths}, torch.stack(columns), recorded, held_out.name)
    if trained is not None:
        for point, name in zip(choice.points, (BASE, *adapters)):
            point.reward = scores[name][as_reward(trained).name].double().mean().item()
        choice.same = True
    return choice


def choose(
    paths: dict[int, Path | None], scores: torch.Tensor, trained: dict[int, float], name: str
) -> Choice:
    """Choose by scores `(paths, prompts)` of the held-out reward `name`; the base comes first.

    `trained` is the training reward by step.
    """
    steps, prompts = list(paths), scores.shape[1]
    means = scores.mean(1)
    candidates = means[1:]  # the base is no checkpoint
    place = 1 + int(candidates.nan_to_num(nan=-math.inf).argmax())  # of equals the earliest
    # Training rewards since the previous checkpoint.
    spans = zip([steps[0], *steps], steps)
    since = [[r for step, r in trained.items() if a < step <= b] for a, b in spans]
    rewards = [sum(found) / len(found) if found else None for found in since]
    low, high = (bound[:, place] for bound in simultaneous_intervals(scores))
    judged = (means, (scores - scores[place]).mean(1), low, high)
    columns = (steps, paths.values(), rewards, *(column.tolist() for column in judged))
    points = [Point(*row) for row in zip(*columns)]
    verdict = _verdict(points, points[place], trend(since[place], since[-1]), prompts)
    return Choice(points, points[place], verdict, name, prompts)


def _verdict(points: list[Point], best: Point, trend: str, prompts: int) -> str:
    """One sentence that claims only what the intervals show."""
    base, last = points[0], points[-1]
    if prompts < MIN_PROMPTS:
        return (
            f"step {best.step} scores highest, but {prompts} prompts are too few to tell; "
            f"use at least {MIN_PROMPTS}"
        )
    if last is best:
        verdict = f"the held-out reward is highest at the last checkpoint, step {best.step}"
    elif last.high < 0:
        verdict = f"{trend}; the held-out reward has fallen since step {best.step}"
    else:
        verdict = (
            f"no clear difference between step {best.step}, where the held-out reward is highest, "
            f"and the last, {last.step}"
        )
    if base.low > 0:
        return f"{verdict}; even there it is below the base model's"
    if base.high < 0:
        return verdict
    return f"{verdict}; step {best.step} is not clearly better than the base model"


def trend(before: list[float], after: list[float]) -> str:
    """What the training reward did between two stretches of steps, unpaired: their prompts differ."""
    if min(len(before), len(after)) < 2:
        return "too few steps to tell what the training reward did"
    welch: Any = scipy.stats.ttest_ind(after, before, equal_var=False)
    t = welch.statistic
    if not abs(t) > 2:
        return "the training reward stays about where it was"
    return "the training reward still rises" if t > 0 else "the training reward falls too"
