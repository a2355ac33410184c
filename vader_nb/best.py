"""Which checkpoint to keep: the one that a reward nobody trained on likes best.

choice = best_checkpoint("runs/mine", model, pick(), prompts.get("tiny_held_out")[::8])
print(choice.verdict)          the reward still rises, the held-out one fell since step 120
adapter = lora.load(model, choice.path)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .checkpoints import metrics_until, steps_of
from .evaluate import BASE, FEWEST, RESAMPLES, Bench, evaluate, thumbnails, widened
from .gradient import Sampling
from .lora import Adapter
from .models import VideoModel
from .rewards import Reward, as_reward


class Validation:
    """Watches a reward that training does not see, while it trains: `align(validate=Validation(model, pick(), texts))`.

    Called with the adapter on the model, it returns the mean of each reward over the clips of the prompts, always at the
    same seeds. Several processes share the clips.
    """

    def __init__(
        self,
        model: VideoModel,
        rewards: Reward | Callable | list[Reward | Callable],
        prompts: Sequence[str],
        *,
        sampling: Sampling | None = None,
        batch_size: int = 8,
        seed: int = 10_000,
    ):
        if not len(prompts):
            raise ValueError("a validation needs prompts")
        self.rewards = [
            as_reward(reward) for reward in (rewards if isinstance(rewards, list) else [rewards])
        ]
        self.prompts = prompts
        self.bench = Bench(model, self.rewards, thumbnails, sampling, 1, batch_size, seed, keep=0)

    def __call__(self, adapter: Adapter) -> dict[str, float]:
        with torch.random.fork_rng():  # a reward that draws must not change what training draws
            scores, _ = self.bench.run(
                adapter, self.prompts, tqdm(total=len(self.prompts), disable=True)
            )
        return {reward.name: scores[reward.name].mean().item() for reward in self.rewards}


@dataclass
class Point:
    """A checkpoint: its step (0: the base model, which has no path); the mean training reward of the steps since the
    checkpoint before (None where none was recorded); the held-out reward's mean over prompts and seeds; its paired
    difference to the best checkpoint, with an interval [low, high] that holds for all checkpoints at once (95 %)."""

    step: int
    path: Path | None
    reward: float | None
    held_out: float
    difference: float
    low: float
    high: float


@dataclass
class Choice:
    """All points, the base first; the best of the checkpoints; and what there is to say about it, in one sentence."""

    points: list[Point]
    best: Point
    verdict: str
    reward: str  # the held-out one's name
    prompts: int

    @property
    def step(self) -> int:
        return self.best.step

    @property
    def path(self) -> Path:
        return self.best.path

    def __str__(self) -> str:
        lines = [
            f"{'step':>6} {'training':>9} {'held-out':>9}  difference to step {self.step} [95 % interval]"
        ]
        for point in self.points:
            training = "" if point.reward is None else f"{point.reward:.4f}"
            interval = (
                ""
                if point is self.best
                else f"{point.difference:+.4f} [{point.low:+.4f}, {point.high:+.4f}]"
            )
            lines.append(
                f"{point.step:>6} {training:>9} {point.held_out:9.4f}  {interval or 'the best'}"
            )
        return "\n".join([*lines, f"held-out: {self.reward}, {self.prompts} prompts", self.verdict])

    __repr__ = __str__

    def plot(self):
        """Both rewards over steps, as a matplotlib Figure. A checkpoint is clearly worse than the best one where the
        band around the held-out curve stays below the dotted line."""
        from matplotlib.figure import Figure

        steps, best = [point.step for point in self.points], self.best
        figure = Figure(figsize=(6, 4.5), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        trained = [point for point in self.points if point.reward is not None]
        above.plot(
            [p.step for p in trained],
            [p.reward for p in trained],
            "o-",
            color="#3b82c4",
            markersize=4,
        )
        above.set(ylabel="trained on")
        below.plot(steps, [p.held_out for p in self.points], "o-", color="#d97706", markersize=4)
        band = [
            [best.held_out + value for value in side]
            for side in zip(*((p.low, p.high) for p in self.points))
        ]
        below.fill_between(steps, *band, color="#d97706", alpha=0.2, linewidth=0)
        below.axhline(best.held_out, color="gray", linestyle=":", linewidth=1)
        below.plot(
            best.step,
            best.held_out,
            "*",
            color="#d97706",
            markersize=15,
            label=f"best: step {best.step}",
        )
        below.set(ylabel=f"held out: {self.reward}", xlabel="step")
        below.legend(loc="best")
        return figure


def best_checkpoint(
    run_folder: str | Path,
    model: VideoModel,
    held_out: Reward | Callable,
    prompts: Sequence[str],
    *,
    seeds_per_prompt: int = 2,
    batch_size: int = 8,
    sampling: Sampling | None = None,
    seed: int = 10_000,
    progress: bool = True,
) -> Choice:
    """Score every checkpoint of a run, and the base, with a reward that was not trained on, at the same prompts and
    seeds. A run that keeps k checkpoints costs k + 1 samplings of the prompts.

    Raises FileNotFoundError if the folder holds no checkpoint, and whatever `evaluate` raises.
    """
    folder, held_out = Path(run_folder), as_reward(held_out)
    paths = steps_of(folder)
    if not paths:
        raise FileNotFoundError(
            f"no checkpoint in {folder / 'checkpoints'}: is this a run's folder?"
        )
    evaluation = evaluate(
        model,
        {str(step): path for step, path in paths.items()},
        [],
        {"held-out": prompts},
        held_out=[held_out],
        seeds_per_prompt=seeds_per_prompt,
        batch_size=batch_size,
        sampling=sampling,
        seed=seed,
        keep=1,
        progress=progress,
    )
    scores = evaluation.scores["held-out"]
    means = torch.stack(
        [scores[name][held_out.name].double().mean(0) for name in [BASE, *map(str, paths)]]
    )
    return choose({0: None} | paths, means, training_rewards(folder), held_out.name)


def training_rewards(folder: Path) -> dict[int, float]:
    """Step -> mean reward of its batch, as the run recorded it; a run without record has none."""
    return {row["step"]: row["reward"] for row in metrics_until(folder) if "reward" in row}


def choose(
    paths: dict[int, Path | None], means: torch.Tensor, trained: dict[int, float], name: str
) -> Choice:
    """The choice among checkpoints (step -> path, 0 the base), given their held-out scores a prompt, means
    (checkpoints, prompts), and the training reward of each step."""
    steps = list(paths)
    scores = means[1:].mean(1)  # the base is no checkpoint
    place = 1 + int(scores.where(~scores.isnan(), -math.inf).argmax())  # of equals the earliest
    low, high = simultaneous(means)
    since = [[r for s, r in trained.items() if a < s <= b] for a, b in zip(steps, steps[1:])]
    rewards = [None, *(sum(part) / len(part) if part else None for part in since)]
    points = [
        Point(
            step,
            paths[step],
            rewards[i],
            means[i].mean().item(),
            (means[i] - means[place]).mean().item(),
            low[i, place].item(),
            high[i, place].item(),
        )
        for i, step in enumerate(steps)
    ]
    return Choice(
        points, points[place], verdict(points, place, since, means.shape[1]), name, means.shape[1]
    )


def simultaneous(means: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Bootstrap intervals of all pairwise mean differences of (K, prompts) scores, low and high (K, K), row minus
    column, that hold all at once with 95 % (about 94 with 32 prompts, 76 to 90 with 6 to 16): by the largest of the pairs' t
    statistics, resampled over prompts.

    The best one of many is partly the luckiest one: against it, intervals for a single pair would find that the
    reward "fell since" in runs in which nothing happened."""
    count = means.shape[1]
    draws = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(seed))
    shift = means[:, draws].mean(-1) - means.mean(1, keepdim=True)  # (K, resamples)
    error = (means[:, None] - means[None, :]).std(-1) / count**0.5  # (K, K)
    t = (shift[:, None] - shift[None, :]).abs() / error[..., None].clamp(min=1e-12)
    reach = widened(t.nan_to_num(0).flatten(0, 1).amax(0).quantile(0.95).item(), count) * error
    difference = means.mean(1)[:, None] - means.mean(1)[None, :]
    return difference - reach, difference + reach


def verdict(points: list[Point], place: int, since: list[list[float]], prompts: int) -> str:
    """One sentence; nothing in it that the intervals do not bear."""
    best, last, base = points[place], points[-1], points[0]
    if prompts < FEWEST:
        return f"step {best.step} scores highest, but {prompts} prompts are too few to tell; take {FEWEST} at least"
    if last is best:
        said = f"the held-out reward is highest at the last checkpoint, step {best.step}"
    elif last.high < 0:
        said = f"{trend(since[place - 1], since[-1])}, the held-out one fell since step {best.step}"
    else:
        said = f"no clear difference between step {best.step}, where the held-out reward is highest, and the last, {last.step}"
    if base.low > 0:
        return f"{said}; even there it is below the base model's"
    if base.high < 0:
        return said
    return f"{said}; step {best.step} is not clearly better than the base model"


def trend(before: list[float], after: list[float]) -> str:
    """What the training reward did between two stretches of steps; their batches are different prompts, so unpaired."""
    if min(len(before), len(after)) < 2:
        return "whatever the reward did"
    first, second = (
        torch.tensor(before, dtype=torch.float64),
        torch.tensor(after, dtype=torch.float64),
    )
    change = second.mean() - first.mean()
    error = (first.var() / len(first) + second.var() / len(second)).sqrt()
    if change.abs() <= 2 * error:
        return "the reward stays about where it was"
    return "the reward still rises" if change > 0 else "the reward falls too"
