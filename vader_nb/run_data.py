"""What the folders of runs and races hold, in one form for both; also while they are written."""

import contextlib
import itertools
import json
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from . import checkpoints
from .evaluation import BASE
from .meter import COSTS
from .race_results import EVALUATED, Race, Runs
from .sampling import Sampling

AXES = (*COSTS, "step")
DESCRIPTIONS = ("diversity", "motion")  # they describe the clips, and are not rewards
NAMED = ("reward", "held-out reward", "oracle accuracy")  # a race's names for metrics
PRUNED = "{label}: its adapter was not kept."
UNTRAINED = "{label} has no adapter: its clips are chosen, or steered, while they are sampled."


@dataclass(frozen=True)
class Point:
    """An evaluation of a race, or a step of a run.

    Attributes:
        label: Names it among all points.
        values: What was spent and measured by then, of each seed.
        folder: Of the run, or that of the first seed; None without training.
        adapter: Its adapter, if that was kept.
        clip: A picture of its clips, if the run was watched.
        listed: Whether there is, or might be, something to see.
    """

    label: str
    values: Mapping[str, list[float]]
    folder: Path | None = None
    adapter: Path | None = None
    clip: Path | None = None
    listed: bool = True

    @property
    def missing(self) -> str:
        """Why there are no clips even with a model, if so."""
        if self.adapter or self.clip or self.label == BASE:
            return ""
        return (PRUNED if self.folder else UNTRAINED).format(label=self.label)

    @property
    def sampling(self) -> Sampling | None:
        """The settings that the run was asked for."""
        if self.folder is None:
            return None
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return Sampling(**config["sampling"])

    def mean(self, name: str) -> float:
        values = self.values.get(name, [math.nan])
        return sum(values) / len(values)


@dataclass(frozen=True)
class Contestant:
    """A contestant of a race at its best learning rate, or a run; `trained` if it has a curve, not a level."""

    name: str
    remark: str
    points: list[Point]
    trained: bool = True

    def where(self, *names: str) -> list[Point]:
        """The points that have all of these values."""
        return [point for point in self.points if all(name in point.values for name in names)]


def by_name(folders) -> dict[str, Path]:
    """Folders by the names that runs have."""
    if isinstance(folders, Mapping):
        return {name: Path(folder).expanduser() for name, folder in folders.items()}
    given = [folders] if isinstance(folders, str | Path) else folders
    paths = [Path(folder).expanduser() for folder in given]
    names = [path.name for path in paths]
    return {p.name if names.count(p.name) == 1 else str(p): p for p in paths}


def last_written(folder: Path) -> float:
    """When something was last written in a folder, or in those of its runs; 0 if it is not there."""
    newest = 0.0
    for path in (folder, *folder.glob("*"), *folder.glob("*/*")):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            newest = max(newest, path.stat().st_mtime)
    return newest


def read(folders: Mapping[str, Path]) -> list[Contestant]:
    """The contestants of races and the runs in these folders, or in folders within them."""
    found = []
    for name, folder in folders.items():
        if (folder / "race.json").is_file():
            found += read_race(folder)
        elif (folder / "metrics.jsonl").is_file():
            found.append(read_run(folder, name))
        elif folder.is_dir():
            inside = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
            found += [read_run(path, path.name) for path in inside]
    return found


def read_race(folder: Path) -> list[Contestant]:
    race, found = Race(folder), []
    for of in race.runs().values():
        runs = max(of, key=Runs.rank)
        seeds = f"{len(runs.ends)} seed{'s' * (len(runs.ends) > 1)}"
        remark = f"learning rate {runs.rate:g}, {seeds}" if runs.rate else ""
        remark = "not finite at any learning rate" if runs.failed else remark
        found.append(Contestant(runs.label, remark, race_points(race, runs), bool(runs.rate)))
    return found


def race_points(race: Race, runs: Runs) -> list[Point]:
    if runs.failed:
        return []
    own = {race.metric(name): name for name in NAMED}
    names = {name: str(own.get(name, name)) for name in runs.ends[0]["scores"]}
    scores = {called: runs.scores(name).mean(2) for name, called in names.items()}
    points, kept = [], {}
    folder = race.folder / runs.lines[0][0]["folder"] if runs.rate else None
    if folder:
        kept = adapters(folder, runs.ends[0]["step"])
    for i, lines in enumerate(zip(*runs.lines)):
        values: dict[str, list[float]] = {n: [line[n] for line in lines] for n in AXES}
        values |= {name: of_seeds[:, i].tolist() for name, of_seeds in scores.items()}
        part, adapter = lines[0]["part"], kept.get(lines[0]["step"])
        label = f"{runs.name} · evaluation {part}" if folder else runs.name
        if folder and (folder / EVALUATED.format(part)).is_file():
            adapter = folder / EVALUATED.format(part)
        points.append(Point(label, values, folder, adapter))
    return points


def read_run(folder: Path, name: str = "run") -> Contestant:
    rows = checkpoints.read_metrics(folder)
    points, titles, spent = [], run_titles(rows), {}
    for cost in COSTS:
        if rows and cost in rows[0]:
            add = max if cost == "bytes_kept" else operator.add
            spent[cost] = [*itertools.accumulate((row[cost] for row in rows), add)]
    known, clips = adapters(folder, rows[-1]["step"] if rows else 0), watched(folder)
    for i, row in enumerate(rows):
        step = row["step"]
        values = {titles[key]: [value] for key, value in row.items() if key in titles}
        values |= {"step": [step]} | {cost: [sums[i]] for cost, sums in spent.items()}
        seen = bool(values.keys() & set(DESCRIPTIONS)) or step in known or step in clips
        label = f"{name} · step {step}"
        points.append(Point(label, values, folder, known.get(step), clips.get(step), seen))
    return Contestant(name, f"step {len(rows) and rows[-1]['step']}", points)


def run_titles(rows: list[dict]) -> dict[str, str]:
    """What is drawn from a run's rows, and its title."""
    titles = {"reward": "trained reward"}
    for key in (key for row in rows for key in row if key.startswith("validation/")):
        name = key.removeprefix("validation/")
        titles[key] = name if name in DESCRIPTIONS else f"{name} (held out)"
    return titles | {"grad_norm": "gradient norm"}


def ended(folder: Path) -> Path | None:
    """A run's final adapter, if it was written after the last step."""
    adapter, rows = folder / "adapter.safetensors", folder / "metrics.jsonl"
    last = rows.stat().st_mtime if rows.is_file() else 0.0
    return adapter if adapter.is_file() and adapter.stat().st_mtime >= last else None


def adapters(folder: Path, last: int) -> dict[int, Path]:
    """The adapters that a run has kept, by step; `last` is its last one."""
    found, end = checkpoints.list_checkpoints(folder), ended(folder)
    return found | ({last: end} if end else {})


def watched(folder: Path) -> dict[int, Path]:
    """The pictures of clips that a `TrainingMonitor` has put into a run's folder, by step."""
    paths = sorted((folder / "watched").glob("step-*.webp"))
    return {int(path.stem.removeprefix("step-")): path for path in paths}
