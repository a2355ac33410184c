"""Compare the base model with adapters: same prompts, same seeds, every reward, and oracles.

evaluation = evaluate(model, run, reward, {"training": seen, "held-out": unseen}, held_out=[pick()])
evaluation.report(run.folder / "report.html", run)

evaluate(model, {"K = 1": "runs/k1", "K = 5": "runs/k5"}, reward, "tiny_held_out")
"""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from . import distributed, lora, metrics
from . import prompts as prompt_sets
from .checkpoints import random_states_kept, to_json, write_text
from .lora import Adapter
from .metrics import Scores, measure, motion, thumbnails, unique_metrics, videomae_features  # noqa: F401
from .models import VideoModel
from .offload import is_sharded
from .prompts import Prompt
from .rewards import Reward
from .sampling import Sampling, sample
from .stats import NOTES, Row, paired_row
from .video import Gallery, Video, grid
from .zoo import world

BASE = "base"


@dataclass
class Evaluation:
    """The result of `evaluate`: shows itself as a table, saves itself and writes a report."""

    rows: list[Row]
    # The first clips of each group: prompts, base, then each adapter, (N, F, 3, H, W).
    clips: dict[str, tuple]
    fps: int
    adapters: Sequence[str] = ("adapter",)
    # The scores of all clips: group -> "base" or adapter -> metric -> (seeds, prompts).
    scores: dict[str, dict[str, Scores]] = field(default_factory=dict)
    # Judges that went away in the middle: metric -> what happened.
    failed: dict[str, str] = field(default_factory=dict)

    def row(self, group: str, metric: str, name: str | None = None) -> Row:
        """Return the row of a metric, of the first adapter unless named."""
        for row in self.rows:
            if (row.group, row.metric) == (group, metric) and name in (None, row.name):
                return row
        wanted = f"{group!r}, {metric!r}" + (f", {name!r}" if name else "")
        known = "; ".join(sorted({f"{row.group!r}, {row.metric!r}" for row in self.rows}))
        raise KeyError(f"no row {wanted}; choose one of {known}")

    def to_pandas(self):
        """Return the rows as a pandas DataFrame, with the fields of `Row` and `significant`."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas") from error
        return pandas.DataFrame([asdict(r) | {"significant": r.significant} for r in self.rows])

    def __str__(self) -> str:
        several = len(self.adapters) > 1
        mean = "mean" if several else "adapter"
        lines = [["", "", "adapter", "base", mean, "difference", "95% interval", "p", "wins", ""]]
        for row in self.rows:
            words = [row.group, row.label + " †" * row.held_out, row.name or ""]
            lines.append([*words, *row.texts(), "*" * row.significant])
        if not several:
            lines = [line[:2] + line[3:] for line in lines]
        if not self.adapters:  # the base alone
            lines = [line[:3] for line in lines]
        # Words to the left, numbers to the right.
        words = 3 if several else 2
        sides = "<" * words + ">" * (len(lines[0]) - words)
        widths = [max(map(len, column)) for column in zip(*lines)]
        table = []
        for line in lines:
            cells = [f"{cell:{side}{w}}" for cell, side, w in zip(line, sides, widths)]
            table.append("  ".join(cells).rstrip())
        held_out = ["† not trained on"] * any(row.held_out for row in self.rows)
        notes = [f"* {NOTES[0]}", *NOTES[1:]] if self.adapters else []
        return "\n".join([*table, *notes, *held_out, *self.remarks])

    __repr__ = __str__

    @property
    def remarks(self) -> list[str]:
        """What was not measured, and why."""
        return [f"measured only in part: {metric} ({why})" for metric, why in self.failed.items()]

    def gallery(self, group: str, count: int = 6) -> Gallery:
        """Show the base over the adapters, on the same prompts and seeds."""
        prompts, *clips = self.clips[group]
        rows = [
            [Video(clip, self.fps, prompt) for clip, prompt in zip(frames[:count], prompts)]
            for frames in clips
        ]
        return Gallery(dict(zip([BASE, *self.adapters], rows)))

    def save(self, folder: str | Path) -> None:
        """Write `evaluation.json`, and in `clips/` a gif and an mp4 of each group."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [asdict(row) for row in self.rows]
        write_text(folder / "evaluation.json", to_json(rows, indent=2) + "\n")
        for number, (_, *clips) in enumerate(self.clips.values()):
            sheet = grid(torch.cat([frames[:8] for frames in clips]), len(clips[0][:8]))
            for suffix in (".gif", ".mp4"):  # a number, because a prompt is never a file name
                path = folder / "clips" / f"group-{number}{suffix}"
                Video(sheet, self.fps).save(path, width=1024)

    def report(self, path: str | Path, run=None, choice=None) -> Path:
        """Write one self-contained HTML file; see `report.write_report`."""
        from .report import write_report

        return write_report(self, path, run, choice)


def evaluate(
    model: VideoModel,
    adapter: Any,
    rewards: Reward | Callable | Sequence[Reward | Callable],
    prompts: Mapping[str, str | Path | Sequence[str]] | str | Path | Sequence[str],
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
    """Compare the base model with adapters on the same prompts and seeds.

    Under `accelerate launch` the processes split the clips, and all return the same result.

    Args:
        model: The model. Afterwards it carries the adapter that it carried before.
        adapter: An `Adapter`, run, path or `{path: weight}`; `BestOf`, `RewardGuidance`; a dict of these by
            name; or None for the base alone.
        rewards: The rewards trained on. A sum is reported as a whole and part by part.
        prompts: Groups of prompts by name, or one group: a list, a set's name, or a file.
        held_out: Rewards that were not trained on, and are therefore the ones to believe.
        seeds_per_prompt: Clips per prompt. Diversity needs two.
        batch_size: Clips sampled at once.
        sampling: How to sample; None for the model's defaults.
        features: Function from frames `(B, F, 3, H, W)` to `(B, D)`, the space in which diversity
            is the variance over the seeds of a prompt; its attribute `unit` names that space in tables.
        seed: The first seed, far from those of training.
        keep: Clips of each group that are kept for pictures.
        progress: Show a progress bar.

    If a judge outside this process (`rewards.server`) fails on the first clips, the evaluation ends; if it
    goes away later, its score is left empty, with a warning, and everything else is measured.

    Raises:
        ValueError: An adapter does not fit, a group has no prompts, or rewards are in conflict.
        FileNotFoundError: An adapter or a prompt file is missing.
        JudgeError: A judge does not answer. All three before the work starts.
    """
    adapters, groups = named_adapters(adapter), prompt_groups(prompts)
    measured, trained = unique_metrics(rewards, held_out)
    numbers = (seeds_per_prompt, batch_size, seed, keep)
    evaluator = Evaluator(model, measured, sampling, features, *numbers)
    for which in adapters.values():
        lora.check_fits(model, which)
    clips, scores = evaluator.compare(adapters, groups, progress)
    trained |= {"motion", "diversity"}  # descriptions that judge nothing
    units = {"diversity": getattr(features, "unit", "")}
    rows = paired_rows(scores, list(adapters), trained, units)
    fps, failed = model.defaults["fps"], evaluator.failed
    return Evaluation(rows, clips, fps, list(adapters), scores, failed)


def paired_rows(scores, adapters: list[str], trained: set[str], units: dict[str, str]) -> list[Row]:
    """A row for each group, metric and adapter, from scores by group, name and metric."""
    rows = []
    for group, by_name in scores.items():
        for metric, base in by_name[BASE].items():
            for name in adapters or [None]:
                after = None if name is None else by_name[name].get(metric)  # its judge may be gone
                label, unit = None if after is None else name, units.get(metric, "")
                row = paired_row(group, metric, base, after, label, metric not in trained, unit)
                rows.append(row)
    return rows


def named_adapters(adapter: Any) -> dict[str, Any]:
    """Return adapters by name; a single one is called "adapter"."""
    if adapter is None:
        return {}
    # {path: weight} is one adapter.
    one = not isinstance(adapter, Mapping) or (
        adapter and all(isinstance(weight, (int, float)) for weight in adapter.values())
    )
    adapters = {"adapter": adapter} if one else dict(adapter)
    if BASE in adapters:
        raise ValueError(f"no adapter can be named {BASE!r}: that is the model without one")
    return adapters


def prompt_groups(prompts: Any) -> dict[str, list[str | Prompt]]:
    """Return groups of prompts by name; a single one is called "prompts"."""
    groups = prompts if isinstance(prompts, Mapping) else {"prompts": prompts}
    if not groups:
        raise ValueError("no group of prompts to evaluate on; give {'held-out': [...]}")
    for group, source in groups.items():
        if not isinstance(source, (str, os.PathLike)) and not len(source):
            raise ValueError(f"group {group!r} has no prompts")
    return {group: prompt_sets.get(source) for group, source in groups.items()}


@dataclass
class Evaluator:
    """Samples and scores groups of prompts, always in the same way; fields as in `evaluate`."""

    model: VideoModel
    metrics: list[Reward]
    sampling: Sampling | None = None
    features: Callable[[torch.Tensor], torch.Tensor] = thumbnails
    seeds_per_prompt: int = 2
    batch_size: int = 8
    seed: int = 10_000
    keep: int = 16

    def __post_init__(self):
        for name in ("seeds_per_prompt", "batch_size", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        sampling = (self.sampling or Sampling()).resolve(self.model)
        self.num_frames = sampling.total_frames
        self.segment = sampling.num_frames if sampling.extend > 1 else None
        for metric in self.metrics:
            metric.check_frames(self.num_frames)
            metric.at_fps(self.model.defaults["fps"])
            metric.check_ready()
        self.failed: dict[str, str] = {}  # judges that went away: they are not asked again
        self.judged = False  # whether all have scored once: what fails at once is a mistake
        least = getattr(self.features, "min_frames", 1)
        self.diverse = self.seeds_per_prompt > 1 and self.num_frames >= least
        self.rank, self.num_processes = 0, 1
        # Asked first, because accelerate's state, once made, decides the device of later training.
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            state = PartialState(cpu=self.model.device.type == "cpu")
            self.rank, self.num_processes = state.process_index, state.num_processes

    def check_prompts(self, prompts: Iterable[str | Prompt]) -> None:
        """Raises ValueError for a prompt that one of the metrics cannot judge."""
        texts = [str(prompt) for prompt in prompts]
        for metric in self.metrics:
            metric.check_prompts(texts)

    def compare(
        self, adapters: Mapping[str, Any], groups: Mapping[str, Sequence], progress: bool
    ) -> tuple[dict[str, tuple], dict[str, dict[str, Scores]]]:
        """Run the base and each adapter on all groups; clips and scores as in `Evaluation`."""
        texts = {group: [str(prompt) for prompt in prompts] for group, prompts in groups.items()}
        self.check_prompts(sum(texts.values(), []))
        self.tell_what_is_left_out(sum(texts.values(), []))
        distributed.encode_texts(self.model, [p for prompts in groups.values() for p in prompts])
        scores = {group: {} for group in groups}
        clips: dict[str, tuple] = {}
        for group, names in texts.items():
            clips[group] = ((names * self.seeds_per_prompt)[: self.keep],)
        total = (1 + len(adapters)) * self.seeds_per_prompt * sum(map(len, texts.values()))
        hidden = not progress or self.rank > 0
        with tqdm(total=total, desc="evaluate", unit="clip", disable=hidden) as bar:
            for name, which in {BASE: None, **adapters}.items():
                with lora.use_adapter(self.model, which) as adapter:
                    for group, prompts in groups.items():
                        sampler = getattr(which, "sample", sample)
                        scores[group][name], shown = self.run(adapter, prompts, bar, sampler)
                        clips[group] += (shown,)
        return clips, scores

    def tell_what_is_left_out(self, prompts: Sequence[str]) -> None:
        """Warn of metrics that need more frames than the clips have."""
        short = [name for name, least in metrics.MIN_FRAMES.items() if self.num_frames < least]
        if "oracle: motion" in short and not any(map(world.parse, prompts)):
            short.remove("oracle: motion")
        if self.seeds_per_prompt > 1 and not self.diverse:
            short.append("diversity")
        if short and self.rank == 0:
            remark = f"left out, for lack of frames: {', '.join(short)}"
            warnings.warn(f"{remark}; num_frames={self.num_frames}", stacklevel=4)

    @random_states_kept()  # a reward that draws must not change what training draws
    def run(
        self,
        adapter: Adapter | None,
        prompts: Sequence[str | Prompt],
        bar: tqdm | None = None,
        sampler: Callable = sample,
    ) -> tuple[Scores, torch.Tensor]:
        """Score the adapter that is on the model; also return the first clips (N, F, 3, H, W)."""
        if self.model.offloader is None:  # else networks are moved when they are needed
            for metric in self.metrics:
                metric.to(self.model.device)
        # Seed by seed over all prompts, so that the clips that are kept show many prompts.
        clips = range(len(prompts) * self.seeds_per_prompt)
        batches = [clips[start : start + self.batch_size] for start in clips[:: self.batch_size]]
        parts = []
        # Processes share whole batches, because another batch size may round differently.
        for first in range(0, len(batches), self.num_processes):
            number = first + self.rank
            spare = number >= len(batches)
            if spare and not is_sharded(self.model.denoiser):
                break
            batch = batches[min(number, len(batches) - 1)]
            chosen = [prompts[i % len(prompts)] for i in batch]
            seeds = [self.seed + i for i in batch]
            options = {"seeds": seeds, "sampling": self.sampling, "adapter": adapter}
            frames = sampler(self.model, chosen, **options)
            if spare:  # sampled because sharded processes must call the denoiser equally often
                break
            self.model.onload(*(module for metric in self.metrics for module in metric.networks))
            texts = [str(prompt) for prompt in chosen]
            scores = self.measure(frames, texts)
            if self.diverse:
                scores["diversity"] = self.features(frames).float().cpu()
            parts.append((number, scores, frames[: max(0, self.keep - batch.start)].cpu()))
            if bar is not None:
                bar.update(min(len(batch) * self.num_processes, bar.total - bar.n))
        if self.num_processes > 1:
            parts = sorted(gather_object(parts), key=lambda part: part[0])
            for failed in gather_object([self.failed]):
                self.failed |= failed
        _, scores, frames = zip(*parts)
        return self._columns(scores), torch.cat(frames)

    def measure(self, frames: torch.Tensor, prompts: list[str]) -> Scores:
        """Score one batch with the judges that are there."""
        gone = dict(self.failed)
        present = [metric for metric in self.metrics if metric.name not in gone]
        failed = self.failed if self.judged else None
        scores = measure(frames, prompts, present, self.segment, failed)
        for name in self.failed.keys() - gone.keys():
            warnings.warn(f"{name} is left out from here on: {self.failed[name]}", stacklevel=4)
        self.judged = True
        return scores

    def _columns(self, batches: Sequence[Scores]) -> Scores:
        """Join the scores of all batches to (seeds, prompts)."""
        # Oracles may apply to some batches only.
        names = [name for name in batches[0] if all(name in batch for batch in batches)]
        joined = {name: torch.cat([batch[name] for batch in batches]) for name in names}
        shape = (self.seeds_per_prompt, -1)
        columns = {name: column.unflatten(0, shape) for name, column in joined.items()}
        if "diversity" in columns:
            columns["diversity"] = columns["diversity"].var(0).mean(1)[None]
        return columns


class Validation:
    """Scores the adapter during training with rewards that it is not trained on.

    `align(..., validate=Validation(model, pick(), prompts))` calls it with the adapter on the
    model, for the mean of each reward over one clip per prompt, always at the same seeds. Several
    processes split the clips. If a judge is unavailable, its score is NaN that time, with a warning.
    Arguments as in `evaluate`.
    """

    def __init__(
        self,
        model: VideoModel,
        rewards: Reward | Callable | list[Reward | Callable],
        prompts: str | Path | Sequence[str],
        *,
        sampling: Sampling | None = None,
        batch_size: int = 8,
        seed: int = 10_000,
    ):
        self.prompts = prompt_sets.get(prompts)
        listed = rewards if isinstance(rewards, list) else [rewards]
        self.rewards, _ = unique_metrics([], listed)
        numbers = (1, batch_size, seed, 1)
        self.evaluator = Evaluator(model, self.rewards, sampling, thumbnails, *numbers)
        self.evaluator.check_prompts(self.prompts)
        self.evaluator.judged = True  # training goes on in any case

    def __call__(self, adapter: Adapter | None) -> dict[str, float]:
        self.evaluator.failed.clear()
        scores, _ = self.evaluator.run(adapter, self.prompts)
        unknown = torch.tensor(math.nan)  # which is never the best
        names = [reward.name for reward in self.rewards]
        return {name: scores.get(name, unknown).mean().item() for name in names}
