"""A race, or runs beside each other, also while they train: curves, Pareto plots, and the clips behind each point.

viewer = RunViewer("runs/race", model)                    in a notebook; or RunViewer(["runs/a", "runs/b"])
viewer.set(x="seconds", point="VADER · evaluation 3")     the same from Python; viewer.player has the clips
"""

import contextlib
import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from ipywidgets import HTML, Dropdown

from .. import prompts as prompt_sets
from ..drawing import Series, chart, note
from ..evaluation import BASE
from ..models import VideoModel
from ..prompts import Prompt
from ..race_results import COLORS
from ..run_data import AXES, DESCRIPTIONS, Contestant, Point, read
from . import clips
from .controls import choice, row
from .jobs import Job
from .panel import remember
from .player import EMPTY
from .watching import Watcher, by_seed, encoded, flow, load_clip, twice

GRAY = COLORS[-1]  # of the base
IDLE = 3600  # seconds without a line, after which nothing more is expected
KEPT = 12  # points whose clips are kept
NONE = "none yet"
NO_MODEL = "{label}: RunViewer(folder, model) would make its clips."


class RunViewer(Watcher):
    """Curves of races or runs by what was spent, Pareto plots, and the clips of a chosen point.

    Seeds of a race are averaged, with a band from the lowest to the highest; each contestant is shown at its best
    learning rate, as by `Race`. Clips are those of a `TrainingMonitor`, or made with the adapter that a run has kept.

    Args:
        folders: Of a race, of runs, or of a folder with runs in it; one, several, or several by name. They need not
            exist yet.
        model: Makes the clips.
        prompts: Of the clips; default: two of those that the model knows.
        seed: The first seed of the clips.

    Raises:
        ValueError: Prompts without a model.
    """

    title = "Run viewer"
    hint = "Each dot is an evaluation: click one, or choose it in the menu, and its clips play."

    def __init__(
        self,
        folders: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
        model: VideoModel | None = None,
        prompts: str | Sequence[str | Prompt] = (),
        *,
        seed: int = 10_000,
    ):
        if prompts and not model:
            raise ValueError("prompts of clips need a model: RunViewer(folders, model, prompts)")
        self.folders, self.model, self.seed = by_name(folders), model, seed
        examples = clips.examples(model, 2) if model else []
        self.prompts = prompt_sets.get(prompts) if prompts else examples
        self.contestants: list[Contestant] = []
        self.points: dict[str, Point] = {}  # by label
        self._made: dict[Path | None, list[str]] = {}  # the player's pages by adapter
        self._seen: float | None = None  # the newest file's time
        self._shown: tuple = ()  # what the player was asked to show
        super().__init__(
            x=choice("over", [NONE], width="280px"),
            y=choice("metric", [NONE], width="280px"),
            point=choice("clips of", [NONE]),
        )
        self.point.add_class("vader-points")
        self.state = HTML()
        self.on(self.changed, *self.settings.values())
        self.watch(self.point, model, [], row(self.x, self.y), self.state)

    @property
    def over(self) -> bool:
        return time.time() - (self._seen or math.inf) > IDLE

    def refresh(self) -> None:
        newest = max(map(last_written, self.folders.values()))
        if newest == self._seen:
            return
        self.contestants = read(self.folders)
        self._seen = newest
        points = [point for contestant in self.contestants for point in contestant.points]
        self.points = {point.label: point for point in points}
        if len(self.points) < len(points):
            raise ValueError("two contestants or runs have one name: show them in two viewers")
        names = dict.fromkeys(name for point in points for name in point.values)
        ends = [p.label for c in self.contestants if c.trained for p in c.points[-1:] if p.listed]
        with self.quiet():
            offer(self.x, [name for name in AXES if name in names])
            offer(self.y, [name for name in names if name not in AXES])
            offer(self.point, [p.label for p in points if p.listed], *ends[:1])
        self._draw()
        if self._task:  # in a page
            self._show_clips()

    def _draw(self) -> None:
        self.state.value = self._state()
        self.curves.value = flow(self._charts().values())
        self.clips.layout.display = "none" if self.point.value == NONE else "flex"

    def changed(self) -> None:
        self._draw()
        self._show_clips()

    def prepare(self) -> None:
        super().prepare()
        self._show_clips()

    def _state(self, named: bool = False) -> str:
        """The legend, or what is waited for."""
        if not self.points:
            places = ", ".join(str(f.name if named else f) for f in self.folders.values())
            return f"<div><b>waiting</b> for an evaluation or a step in {escape(places)}</div>"
        lines = ""
        for c, color in zip(self.contestants, self._colors()):
            sign = f"<span style='color:{color}'>{'●' if c.trained else '┄'}</span>"
            lines += f"<span>{sign} <b>{escape(c.name)}</b> {escape(c.remark)}</span>"
        band = any(len(p.values["step"]) > 1 for p in self.points.values())
        remark = note("Means over seeds; bands reach from the lowest to the highest." * band)
        return f"<div style='display:flex;flex-wrap:wrap;gap:0 16px'>{lines}</div>{remark}"

    def _colors(self) -> list[str]:
        numbers = itertools.count()
        return [
            GRAY if c.name == BASE else COLORS[next(numbers) % (len(COLORS) - 1)]
            for c in self.contestants
        ]

    def _charts(self) -> dict[str, str]:
        y, drawn = self.y.value, {}
        for x in (self.x.value, *DESCRIPTIONS) if self.points else ():
            pairs = zip(self.contestants, self._colors())
            curves = [self._series(c, color, x, y) for c, color in pairs if x != y]
            if any(curve.points for curve in curves):
                title = f"{y} {'over' if x in AXES else 'against'} {x.replace('_', ' ')}"
                curves.sort(key=lambda curve: len(curve.points) == 1)  # the base over curves
                look = {"chosen": self.point.value, "width": 280, "height": 170}
                drawn[title] = chart(curves, label=title, **look)
        return drawn

    def _series(self, contestant: Contestant, color: str, x: str, y: str) -> Series:
        """Over what was spent: means and a band, or a level without training. Over another metric: the way from the base on."""
        points, start = contestant.where(x, y), []
        values = [(p.mean(x), p.mean(y)) for p in points]
        labels = [p.label if p.listed else "" for p in points]
        if x not in AXES:
            if contestant.trained and points and BASE in self.points:
                start = [(self.points[BASE].mean(x), self.points[BASE].mean(y))]
            return Series(start + values, contestant.name, color, labels=[""] * len(start) + labels)
        if not contestant.trained:
            most = max(p.mean(x) for p in self.points.values() if x in p.values)
            level = [(at, height) for _, height in values for at in (0.0, most)]
            return Series(level, contestant.name, color, "4 5", labels=[""] * len(level))
        seeds = [p.values[y] for p in points]
        lows, highs = [*map(min, seeds)], [*map(max, seeds)]
        return Series(values, contestant.name, color, "", lows, highs, labels)

    def _show_clips(self) -> None:
        point = self.points.get(self.point.value)
        if point is None or (point.label, point.adapter) == self._shown:
            return
        self._shown = point.label, point.adapter
        self.jobs.give_up()  # what another point is being sampled for
        missing = point.missing or (NO_MODEL.format(label=point.label) if not self.model else "")
        if point.clip:
            file = point.clip.with_name("prompts.json")
            prompts = json.loads(file.read_text(encoding="utf-8"))
            self.play(encoded(load_clip(point.clip), prompts, point.label), prompts)
        elif missing:
            self.player.show([EMPTY] * len(self.player.pages.children))
            self.caption.value = note(missing)
        elif point.adapter in self._made:
            self.play(self._made[point.adapter], self.prompts)
        else:
            self.jobs.submit(self._sampling, 0)

    def _sampling(self) -> Job:
        assert self.model is not None  # without one, nothing is sampled
        point = self.points[self.point.value]
        trained = [p for p in self.points.values() if p.folder]
        settings = point if point.folder else next(iter(trained), point)
        weights: dict[str | Path, float] = {point.adapter: 1.0} if point.adapter else {}
        prompts = twice(self.prompts)
        frames = yield from clips.denoising(
            self.model,
            prompts,
            range(self.seed, self.seed + len(prompts)),
            settings.sampling,
            clips.merged(self.model, weights),
        )
        clip = by_seed(frames, self.model.defaults["fps"])
        remember(self._made, point.adapter, encoded(clip, self.prompts, point.label), KEPT)
        self.play(self._made[point.adapter], self.prompts)


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


def offer(menu: Dropdown, options: list[str], first: str | None = None) -> None:
    """Give a menu its options; what was chosen stays, if it is still offered."""
    options = options or [NONE]
    chosen = first if menu.value == NONE or menu.value not in options else menu.value
    if list(menu.options) != options:
        menu.options = options
    menu.value = chosen or options[0]
