"""Base against adapters: the same prompts and seeds, every reward, oracles where they apply, and a report.

evaluation = evaluate(model, run.adapter, reward, {"training": seen, "held-out": unseen}, held_out=[pick()])
evaluation.report(run.folder / "report.html", run)

evaluate(model, {"K = 1": "runs/k1", "K = 5": "runs/k5"}, reward, {"held-out": unseen})     several side by side
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist

import torch
from tqdm.auto import tqdm

from . import lora, parallel
from .align import Run
from .checkpoints import write
from .gradient import Sampling, sample
from .lora import Adapter
from .models import VideoModel
from .rewards import Reward, as_reward
from .video import Gallery, Video, grid

RESAMPLES = 2000
BASE = "base"
# Fewer paired differences than this can all have one sign by chance more often than once in twenty (2 ** -4).
FEWEST = 6

Scores = dict[
    str, torch.Tensor
]  # metric -> (seeds, prompts); diversity, one value a prompt, (1, prompts)


# ------------------------------------------------------------------------------------------- the result


@dataclass
class Row:
    """One metric of one adapter on one group of prompts: means of base and adapter over prompts, the mean paired
    difference with its 95 % bootstrap interval [low, high] over prompts, and the win rate: the share of paired
    clips (for diversity: prompts) on which the adapter is higher, ties half. held_out: nobody trained on the metric.
    Where only the base was evaluated there is no adapter's name and everything but `base` and `prompts` is None."""

    group: str
    metric: str
    base: float
    adapter: float | None
    difference: float | None
    low: float | None
    high: float | None
    prompts: int
    name: str | None = "adapter"
    win_rate: float | None = None
    held_out: bool = False

    @property
    def clear(self) -> bool:
        """The interval excludes zero, and there are enough prompts for one to mean it."""
        return self.name is not None and self.prompts >= FEWEST and (self.low > 0 or self.high < 0)

    @property
    def decimals(self) -> int:
        """Digits after the point that show two leading ones of the interval, and that a clear one excludes zero; 3 to 6."""
        bounds = sorted(
            abs(value) for value in (self.low, self.high) if value and math.isfinite(value)
        )
        needed = [1 - math.floor(math.log10(bounds[-1]))] if bounds else []
        needed += [-math.floor(math.log10(bounds[0]))] if self.clear else []
        return min(6, max([3, *needed]))

    def texts(self) -> list[str]:
        """base, adapter, difference, interval and win rate as they stand in tables."""

        def number(value, sign=""):
            return "nan" if math.isnan(value) else f"{value:{sign}.{self.decimals}f}"

        if self.name is None:
            return [number(self.base), "", "", "", ""]
        difference, low, high = (
            number(value, "+") for value in (self.difference, self.low, self.high)
        )
        wins = "" if self.win_rate is None else f"{self.win_rate:.0%}"
        return [number(self.base), number(self.adapter), difference, f"{low} to {high}", wins]


@dataclass
class Evaluation:
    """Rows of the comparison; the first clips of each group: group -> (prompts, base, one for each adapter), the clips
    as (N, F, 3, H, W); the adapters' names; and every clip's scores: group -> base or adapter's name -> `Scores`."""

    rows: list[Row]
    clips: dict[str, tuple]
    fps: int
    adapters: Sequence[str] = ("adapter",)
    scores: dict[str, dict[str, Scores]] = field(default_factory=dict)

    def row(self, group: str, metric: str, name: str | None = None) -> Row:
        """The row of a metric, of the first adapter unless named."""
        for row in self.rows:
            if (row.group, row.metric) == (group, metric) and name in (None, row.name):
                return row
        raise KeyError(
            f"no row {group!r}, {metric!r}{f', {name!r}' if name else ''}; there are {self._keys()}"
        )

    def _keys(self) -> str:
        return "; ".join(sorted({f"{row.group!r}, {row.metric!r}" for row in self.rows}))

    def __str__(self) -> str:
        several = len(self.adapters) > 1
        lines = [
            ["", "", *(["adapter"] if several else []), "base", "mean" if several else "adapter"]
        ]
        lines[0] += ["difference", "95 % interval", "wins", ""]
        for row in self.rows:
            metric = row.metric + (" †" if row.held_out else "")
            name = [row.name or ""] if several else []
            lines.append([row.group, metric, *name, *row.texts(), "*" if row.clear else ""])
        widths = [max(map(len, column)) for column in zip(*lines)]
        left = 3 if several else 2
        table = [
            "  ".join(
                f"{cell:<{w}}" if i < left else f"{cell:>{w}}"
                for i, (cell, w) in enumerate(zip(line, widths))
            )
            for line in lines
        ]
        notes = [f"* the interval excludes zero, on at least {FEWEST} prompts"]
        notes += ["† not trained on"] if any(row.held_out for row in self.rows) else []
        return "\n".join([line.rstrip() for line in table] + notes)

    __repr__ = __str__

    def gallery(self, group: str, count: int = 6) -> Gallery:
        """Base over adapters, same prompts and seeds."""
        prompts, *clips = self.clips[group]
        return Gallery(
            {
                who: [Video(clip, self.fps, prompt) for prompt, clip in zip(prompts, row[:count])]
                for who, row in zip([BASE, *self.adapters], clips)
            }
        )

    def save(self, folder: str | Path) -> None:
        """`evaluation.json`, and in `clips/` a gif and an mp4 of each group: base above, each adapter below it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write(
            folder / "evaluation.json",
            json.dumps([asdict(row) for row in self.rows], indent=2) + "\n",
        )
        for number, (_, *clips) in enumerate(self.clips.values()):
            rows = torch.cat([row[:8] for row in clips])
            for suffix in (".gif", ".mp4"):  # named by number: a prompt never becomes a file name
                Video(grid(rows, len(clips[0][:8])), self.fps).save(
                    folder / "clips" / f"group-{number}{suffix}", width=1024
                )

    def report(self, path: str | Path, run: Run | None = None, choice=None) -> Path:
        """Write one HTML file that needs no other: clips, curves, table, configuration, versions. run: that of the
        first adapter; choice: what `best.best_checkpoint` found."""
        from .report import render

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, render(self, run, choice))
        return path


# ------------------------------------------------------------------------------------------- the metrics


def interval(differences: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of (N,) paired differences: percentiles of resampled means, taken further
    out for small N (Hesterberg 2015)."""
    count, normal = len(differences), NormalDist()
    tail = normal.cdf(-widened(normal.inv_cdf(0.975), count))
    draws = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(seed))
    means = differences.double()[draws].mean(1)
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def widened(z: float, count: int) -> float:
    """How many standard errors of a bootstrap over `count` draws are as rarely left as z of a normal variable: the
    bootstrap lacks the N / (N - 1) of a sample's variance, and the heavy tails of Student's t."""
    freedom = max(1, count - 1)
    # Student's quantile as a series in 1 / degrees of freedom (Abramowitz & Stegun 26.7.5)
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return t * math.sqrt(count / freedom)


def thumbnails(frames: torch.Tensor) -> torch.Tensor:
    """Features (B, D) of clips: 8x8 thumbnails of all frames, in levels of 0 to 255. A space without weights for
    any model; `videomae_features` are those of a network, which sees meaning."""
    return 255 * torch.nn.functional.adaptive_avg_pool2d(frames.flatten(0, 1), 8).reshape(
        len(frames), -1
    )


def videomae_features(checkpoint: str | Path = "tiny") -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from clips to VideoMAE's features (B, D), their mean over tokens: the space in which VADER's page
    measures diversity. checkpoint: as of `rewards.action`: "tiny", "published", or a directory."""
    from .rewards.action import action, position_table

    reward = action(checkpoint)

    @torch.no_grad()
    def features(frames):
        reward.to(frames.device)
        pixels = reward.pixels(frames)
        with position_table(reward.classifier, pixels.shape[1]):
            return reward.classifier.videomae(pixels).last_hidden_state.mean(1)

    return features


def motion(frames: torch.Tensor) -> torch.Tensor:
    """Mean absolute change from frame to frame, (B,)."""
    return frames.diff(dim=1).abs().mean(dim=(1, 2, 3, 4))


@torch.no_grad()
def measure(
    frames: torch.Tensor, prompts: list[str], rewards: list[Reward]
) -> dict[str, torch.Tensor]:
    """Every per-clip metric: name -> (B,). The oracles join in where all prompts are of the tiny world."""
    from .zoo import oracles, world

    result = {reward.name: reward(frames, prompts).float().cpu() for reward in rewards}
    if all(world.parse(prompt) for prompt in prompts):
        result |= {
            f"oracle: {name}": value for name, value in oracles.grade(frames, prompts).items()
        }
    return result | {"motion": motion(frames).float().cpu()}


# ------------------------------------------------------------------------------------------- the comparison


def evaluate(
    model: VideoModel,
    adapter: Adapter | str | Path | dict[str, Adapter | str | Path] | None,
    rewards: Reward | Callable | list[Reward | Callable],
    prompts: dict[str, Sequence[str]],
    *,
    held_out: Sequence[Reward | Callable] = (),
    seeds_per_prompt: int = 2,
    batch_size: int = 8,
    sampling: Sampling | None = None,
    features: Callable[[torch.Tensor], torch.Tensor] = thumbnails,
    seed: int = 10_000,
    keep: int = 16,
    progress: bool = True,
) -> Evaluation:
    """Compare base and adapters on groups of prompts at the same seeds.

    adapter: the one on the model; or a file, a run's folder or a checkpoint's; or several of these by name; or None,
    for the base alone. Files are loaded one after another, and the base is sampled once. Afterwards the model
    carries what it carried before.
    rewards: what was trained on; a sum is reported as a whole and part by part. held_out: rewards that were not
    trained on, which is why they are the ones to believe; they are marked, as the oracles are.
    Diversity is the variance over the seeds of a prompt in the space of `features` (frames (B, F, 3, H, W) ->
    (B, D)); it needs two seeds a prompt. keep: clips of each group that stay for pictures. Seeds start at `seed`,
    far from a training run's. Under `accelerate launch` the processes share the batches, and all return the same.

    Raises before the work starts: ValueError for an adapter that does not fit or is not on the model, FileNotFoundError
    for a missing one, ValueError for a group without prompts or a held-out reward that was trained on.
    """
    contestants = named(adapter)
    trained, judges = panel(rewards, held_out)
    for name, value in {
        "seeds_per_prompt": seeds_per_prompt,
        "batch_size": batch_size,
        "keep": keep,
    }.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not prompts:
        raise ValueError("no group of prompts to evaluate on; give {'held-out': [...]}")
    for group, texts in prompts.items():
        if not len(texts):
            raise ValueError(f"group {group!r} has no prompts")
    for entry in contestants.values():
        check_fit(model, entry)

    bench = Bench(model, judges, features, sampling, seeds_per_prompt, batch_size, seed, keep)
    scores = {group: {} for group in prompts}
    clips = {group: [bench.texts(texts)] for group, texts in prompts.items()}
    total = (1 + len(contestants)) * sum(map(len, prompts.values())) * seeds_per_prompt
    with tqdm(
        total=total, desc="evaluate", unit="clip", disable=not progress or bench.rank > 0
    ) as bar:
        for name, entry in ({BASE: None} | contestants).items():
            with carrying(model, entry) as worn:
                for group, texts in prompts.items():
                    scores[group][name], shown = bench.run(worn, texts, bar)
                    clips[group].append(shown)
    rows = [
        compared(
            group,
            metric,
            whose[BASE][metric],
            whose.get(name, {}).get(metric),
            name,
            metric not in trained,
        )
        for group, whose in scores.items()
        for metric in whose[BASE]
        for name in contestants or [None]
    ]
    return Evaluation(
        rows,
        {g: tuple(parts) for g, parts in clips.items()},
        model.defaults["fps"],
        [*contestants],
        scores,
    )


def named(adapter) -> dict[str, Adapter | str | Path]:
    """The contestants by name; one without a name is called "adapter"."""
    if adapter is None:
        return {}
    contestants = adapter if isinstance(adapter, dict) else {"adapter": adapter}
    if BASE in contestants:
        raise ValueError(f"no adapter can be named {BASE!r}: that is the model without one")
    return dict(contestants)


def panel(rewards, held_out) -> tuple[set[str], list[Reward]]:
    """The names of the metrics that are no judge of the training (rewards trained on, and the plain descriptions of
    a clip), and all rewards to measure, each with its parts."""
    seen = [as_reward(r) for r in (rewards if isinstance(rewards, (list, tuple)) else [rewards])]
    seen = {part.name: part for reward in seen for part in [reward, *reward.parts()]}
    fresh = {reward.name: reward for reward in map(as_reward, held_out)}
    both = seen.keys() & fresh.keys()
    if both:
        raise ValueError(
            f"{', '.join(sorted(both))}: trained on, so it cannot be held out; name it in one place"
        )
    return {*seen, "motion", "diversity"}, [*seen.values(), *fresh.values()]


def check_fit(model: VideoModel, entry: Adapter | str | Path) -> None:
    """Raise now what would otherwise be raised after the base has been sampled."""
    if not isinstance(entry, Adapter):
        with lora.bare(model):
            lora.load(model, entry).remove()
    elif entry.model is not model or not entry.layers:
        raise ValueError(
            f"the adapter is not on this {model.name!r} (any more); give its file instead"
        )


@contextlib.contextmanager
def carrying(model: VideoModel, entry: Adapter | str | Path | None) -> Iterator[Adapter | None]:
    """The model with that adapter: the one it has, one from a file for a while, or none."""
    if isinstance(entry, Adapter):
        yield entry
        return
    with lora.bare(model):
        adapter = None if entry is None else lora.load(model, entry)
        try:
            yield adapter
        finally:
            if adapter is not None:
                adapter.remove()


@dataclass
class Bench:
    """What is the same for everyone who is measured."""

    model: VideoModel
    judges: list[Reward]
    features: Callable[[torch.Tensor], torch.Tensor]
    sampling: Sampling | None
    seeds_per_prompt: int
    batch_size: int
    seed: int
    keep: int

    def __post_init__(self):
        self.rank, self.world = 0, 1
        # Asked of the environment first: accelerate's state, once made, decides the device of a later training.
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from accelerate import PartialState

            state = PartialState(cpu=self.model.device.type == "cpu")
            self.rank, self.world = state.process_index, state.num_processes

    def texts(self, prompts: Sequence[str]) -> list[str]:
        """The prompts of the clips that stay."""
        return [
            prompts[i % len(prompts)]
            for i in range(min(self.keep, len(prompts) * self.seeds_per_prompt))
        ]

    def run(
        self, adapter: Adapter | None, prompts: Sequence[str], bar
    ) -> tuple[Scores, torch.Tensor]:
        """Scores of all clips of a group, and the first `keep` clips (N, F, 3, H, W)."""
        if self.model.turns is None:  # else they have their turn, as all networks do
            for judge in self.judges:
                judge.to(self.model.device)
        # Seed by seed over all prompts, so that the clips that are kept show many prompts.
        clips = range(len(prompts) * self.seeds_per_prompt)
        batches = [clips[start : start + self.batch_size] for start in clips[:: self.batch_size]]
        mine, turns = [], len(batches)
        if parallel.cut_up(
            self.model.denoiser
        ):  # all must call it equally often: some take a batch again
            turns = -(-turns // self.world) * self.world
        # Whole batches are shared out: of another size, one may round differently.
        for number in range(self.rank, turns, self.world):
            batch = batches[min(number, len(batches) - 1)]
            names = [prompts[i % len(prompts)] for i in batch]
            seeds = [self.seed + i for i in batch]
            frames = sample(self.model, names, seeds=seeds, sampling=self.sampling, adapter=adapter)
            if number >= len(batches):
                break
            self.model.bring(*(network for judge in self.judges for network in judge.networks))
            metrics = measure(frames, names, self.judges)
            if self.seeds_per_prompt > 1:
                metrics["diversity"] = self.features(frames).float().cpu()
            mine.append((number, metrics, frames[: max(0, self.keep - batch.start)].cpu()))
            bar.update(min(len(batch) * self.world, bar.total - bar.n))
        done = sorted(self.gathered(mine), key=lambda part: part[0])
        everywhere = [
            name for name in done[0][1] if all(name in metrics for _, metrics, _ in done)
        ]  # oracles may not be
        columns = {
            name: torch.cat([metrics[name] for _, metrics, _ in done]) for name in everywhere
        }
        columns = {
            name: column.unflatten(0, (self.seeds_per_prompt, -1))
            for name, column in columns.items()
        }
        if self.seeds_per_prompt > 1:
            columns["diversity"] = columns["diversity"].var(0).mean(1, keepdim=True).T
        return columns, torch.cat([frames for _, _, frames in done])

    def gathered(self, parts: list) -> list:
        if self.world == 1:
            return parts
        from accelerate.utils import gather_object

        return gather_object(parts)


def compared(
    group: str, metric: str, base: torch.Tensor, after: torch.Tensor | None, name, held_out: bool
) -> Row:
    """The row of one metric; base and after (seeds, prompts). Prompts are the independent draws, seeds are not."""
    before = base.mean(0).double()
    if after is None:
        return Row(
            group, metric, before.mean().item(), *[None] * 4, len(before), None, None, held_out
        )
    difference = after.mean(0).double() - before
    wins = (after > base).double() + 0.5 * (after == base)
    means = before.mean().item(), (before + difference).mean().item(), difference.mean().item()
    return Row(
        group,
        metric,
        *means,
        *interval(difference),
        len(before),
        name,
        wins.mean().item(),
        held_out,
    )
