"""A race, or runs side by side, even while they train: curves, Pareto plots, and the clips behind each point.

viewer = RunViewer("runs/race", model)                    in a notebook; or RunViewer(["runs/a", "runs/b"])
viewer.set(x="seconds", point="VADER · evaluation 3")     the same from Python; viewer.player has the clips
"""

import math
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from .. import prompts as prompt_sets
from .. import stepwise
from ..drawing import Series, chart, note
from ..evaluation import BASE
from ..models import VideoModel
from ..prompts import Prompt
from ..race_results import colors
from ..run_data import AXES, DESCRIPTIONS, Contestant, Point, by_name, last_written, read
from ..stepwise import Job, remember
from .controls import choice, row
from .player import EMPTY
from .watching import NONE, SEEDS, Watcher, by_seed, encoded, offer

IDLE = 3600  # seconds without a line, after which nothing more is expected
KEPT = 12  # points whose clips are kept
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
            raise ValueError(
                "prompts need a model that makes clips of them: RunViewer(folders, model, prompts)"
            )
        self.folders, self.model, self.seed = by_name(folders), model, seed
        examples = stepwise.examples(model, 2) if model else []
        self.prompts = prompt_sets.get(prompts) if prompts else examples
        self.contestants: list[Contestant] = []
        self.points: dict[str, Point] = {}  # by label
        self._made: dict[Path | None, list[str]] = {}  # the player's pages by adapter
        self._seen: float | None = None  # the newest file's time
        self._shown: tuple = ()  # what the player was asked to show
        super().__init__(
            model,
            "point",
            x=choice("x axis", [NONE], width="280px"),
            y=choice("metric", [NONE], width="280px"),
            point=choice("clips of", [NONE]),
        )
        self.point.add_class("vader-points")
        self.watch([], row(self.x, self.y), self.state)

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
            raise ValueError("two contestants or runs have the same name: show them in two viewers")
        names = dict.fromkeys(name for point in points for name in point.values)
        ends = [p.label for c in self.contestants if c.trained for p in c.points[-1:] if p.listed]
        with self.quiet():
            offer(self.x, [(name.replace("_", " "), name) for name in AXES if name in names])
            offer(self.y, [name for name in names if name not in AXES])
            offer(self.point, [p.label for p in points if p.listed], next(iter(ends), ""))
        self.draw()
        if self._task:  # in a page
            self.show_clips()

    def prepare(self) -> None:
        super().prepare()
        self.show_clips()

    def _state(self, named: bool = False) -> str:
        """The legend, or what is waited for."""
        if not self.points:
            places = ", ".join(str(f.name if named else f) for f in self.folders.values())
            return f"<div><b>waiting</b> for an evaluation or a step in {escape(places)}</div>"
        lines = ""
        for c in self.contestants:
            line = f"<b style='color:{self._color(c)}'>{'━━' if c.trained else '╍╍'}</b>"
            lines += f"<span>{line} <b>{escape(c.name)}</b> {escape(c.remark)}</span>"
        band = any(len(p.values["step"]) > 1 for p in self.points.values())
        remark = note("Means over seeds; bands reach from the lowest to the highest." * band)
        return f"<div style='display:flex;flex-wrap:wrap;gap:0 16px'>{lines}</div>{remark}"

    def _color(self, contestant: Contestant) -> str:
        return colors(c.name for c in self.contestants)[contestant.name]

    def _charts(self) -> dict[str, str]:
        y, drawn = self.y.value, {}
        for x in (self.x.value, *DESCRIPTIONS) if self.points else ():
            shown = self.contestants if x != y else []
            curves = [self._series(c, self._color(c), x, y) for c in shown]
            if any(curve.points for curve in curves):
                title = f"{y} {'over' if x in AXES else 'against'} {x.replace('_', ' ')}"
                curves.sort(key=lambda curve: len(curve.points) == 1)  # the base over curves
                look = {"chosen": self.point.value, "width": 280, "height": 170}
                drawn[title] = chart(curves, label=title, **look)
        return drawn

    def _series(self, contestant: Contestant, color: str, x: str, y: str) -> Series:
        """Over what was spent: means and a band, or a level without training. Over another metric: the path from the
        base."""
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

    def show_clips(self) -> None:
        point = self.points.get(self.point.value)
        if point is None or (point.label, point.adapter) == self._shown:
            return
        self._shown = point.label, point.adapter
        self.jobs.give_up()  # what another point is being sampled for
        missing = point.missing or (NO_MODEL.format(label=point.label) if not self.model else "")
        if point.clip:
            self.play_file(point.clip, point.label)
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
        prompts = self.prompts * SEEDS
        frames = yield from stepwise.denoising(
            self.model,
            prompts,
            range(self.seed, self.seed + len(prompts)),
            settings.sampling,
            stepwise.merged(self.model, weights),
        )
        pages = encoded(by_seed(frames, self.model), self.prompts, point.label)
        remember(self._made, point.adapter, pages, KEPT)
        self.play(pages, self.prompts)
