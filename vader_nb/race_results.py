"""A race as its folder tells it: tables with intervals, curves over what was spent, reward against diversity and motion."""

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .evaluation import BASE
from .meter import COSTS
from .stats import RESAMPLES, paired_interval, resamples
from .tables import Table

LINES = "evaluations.jsonl"
EVALUATED = "evaluation-{}.safetensors"  # the adapter of an evaluation, by its part
GRAY = "#7d8590"  # of the base
COLORS = ("#3b82c4", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#db2777")
COLORS += ("#65a30d", "#6366f1", "#a16207")
METHODS = ("DDPO", "DPO", "GRPO", "VADER")  # have the first colors, the same in every race
MOST_BANDS = 6  # that can be told apart in a plot


def colors(names: Iterable[str]) -> dict[str, str]:
    """A color for each name, legible on white and on black."""
    others = [name for name in names if name != BASE]
    known = {name: COLORS[METHODS.index(name)] for name in others if name in METHODS}
    free = itertools.cycle([color for color in COLORS if color not in known.values()])
    return {BASE: GRAY} | {name: known.get(name) or next(free) for name in others}


def read_lines(path: Path) -> list[dict]:
    """The lines of a file; an incomplete last one is left out."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1].splitlines()
    return [json.loads(line) for line in whole]


class Race:
    """Reads a race's folder, even while it is being written: each method reads it again.

    Metrics have these names: `reward`, which was trained on; `held-out reward`; `oracle accuracy`, the share of
    clips of the tiny world with the right color and shape; `diversity`, `motion`; or any metric's own name. For
    costs, see `race`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        path = self.folder / "race.json"
        if not path.is_file():
            raise FileNotFoundError(f"no race.json in {self.folder}: is this a race's folder?")
        self.settings = json.loads(path.read_text(encoding="utf-8"))

    @property
    def lines(self) -> list[dict]:
        """All evaluations so far, in the order of files, each with the job's `folder`."""
        return [
            line | {"folder": str(path.parent.relative_to(self.folder))}
            for path in sorted(self.folder.rglob(LINES))
            for line in read_lines(path)
        ]

    def metric(self, name: str) -> str:
        """The metric's own name."""
        names = {"reward": self.settings["reward"], "oracle accuracy": "oracle: color and shape"}
        return (names | {"held-out reward": self.settings["held_out_reward"]}).get(name, name)

    def runs(self) -> dict[str, list["Runs"]]:
        """Each contestant's runs, those of one learning rate together; the base first, those without training last."""
        found: dict[tuple, dict] = {}
        for line in self.lines:
            key = line["contestant"], line["learning_rate"]
            found.setdefault(key, {}).setdefault(line["seed"], []).append(line)
        result: dict[str, list[Runs]] = {}
        for (name, rate), seeds in found.items():
            lines = [seeds[seed] for seed in sorted(seeds, key=str)]
            result.setdefault(name, []).append(Runs(self, name, rate, lines))
        return dict(sorted(result.items(), key=lambda of: (of[0] != BASE, not of[1][0].rate)))

    def best(self) -> dict[str, "Runs"]:
        """Each contestant at its best learning rate: the highest `reward` at the end, averaged over seeds.

        While the race runs, only the rates that are furthest along, with the most seeds, are compared.
        """
        runs = self.runs()
        if BASE not in runs:
            raise ValueError(f"the race in {self.folder} has not evaluated the base yet")
        return {name: max(of, key=Runs.rank) for name, of in runs.items()}

    def table(self, against: str = BASE) -> Table:
        """Where each contestant ended: costs, and differences to another with 95% intervals over prompts.

        Differences are means over the runs' seeds, with the lowest and highest seed given, too; the interval is that of
        `stats.paired_interval`. Contestants without training are labeled with the queries that each clip costs.

        Args:
            against: the base, or a contestant.
        """
        best = self.best()
        if against not in best:
            raise KeyError(f"no contestant {against!r}; choose one of {', '.join(map(repr, best))}")
        shown = ("reward", "held-out reward", "oracle accuracy", "diversity", "motion")
        names = [name for name in shown if self.metric(name) in best[BASE].ends[0]["scores"]]
        costs = [cost.replace("_", " ") for cost in COSTS]
        headings = ["contestant", "learning rate", "seeds", *costs, *names]
        rows = []
        for name, runs in best.items():
            rate = f"{runs.rate:g}" if runs.rate else ""
            row = [runs.label, rate, str(len(runs.ends)) if runs.rate else ""]
            row += [count(runs.spent(cost)[-1]) if runs.rate else "" for cost in COSTS]
            rows.append([*row, *(self.cell(runs, best[against], name) for name in names)])
        return Table(headings, rows, headings)

    def cell(self, runs: "Runs", other: "Runs", name: str) -> str:
        """A contestant's end in one metric, against another's."""
        if runs.failed or other.failed:
            return "not finite"
        ends, start = runs.scores(name)[:, -1], other.scores(name)[:, -1].mean(0)
        if runs.name == other.name:
            return f"{start.mean():.4f}"
        low, high = paired_interval(ends.mean(0) - start)
        text = f"{ends.mean():.4f}: {(ends.mean(0) - start).mean():+.4f} [{low:+.4f}, {high:+.4f}]"
        means = ends.mean(1)
        return text + (f"; seeds {means.min():.4f} to {means.max():.4f}" if len(means) > 1 else "")

    def rates(self) -> Table:
        """All learning rates: the reward at the end, by which they were chosen, and the held-out one, with the seeds' range."""
        rows = []
        for name, of in self.runs().items():
            for runs in of if name != BASE and of[0].rate else []:
                values = [runs.ended("reward"), runs.ended("held-out reward")]
                chosen = "chosen" if runs is max(of, key=Runs.rank) else ""
                rows.append([name, f"{runs.rate:g}", str(len(runs.ends)), *values, chosen])
        headings = ["contestant", "learning rate", "seeds", "reward", "held-out reward", ""]
        return Table(headings, rows, headings)

    def reach(
        self, level: float | str, x: str = "reward_queries", y: str = "held-out reward"
    ) -> dict:
        """What each contestant spent until a metric reached a level: name -> (estimate, low, high).

        The seeds' curves are averaged; straight lines join their points, starting at the base. The 95% interval is a
        bootstrap over seeds and prompts, with the same prompts for all; infinite where the level was not reached.

        Args:
            level: a number, or a contestant: the level where that one ended.
            x, y: what was spent, and the metric.
        """
        best = self.best()
        start = best[BASE].scores(y)[0, -1]
        chosen, result = resamples(len(start), 0), {}
        ends = {name: best[name].scores(y)[:, -1] for name in [level] if isinstance(name, str)}

        def goal(seeds: Any = slice(None), of: Any = slice(None)) -> float:
            if not isinstance(level, str):
                return level
            if isinstance(seeds, torch.Tensor):  # while it runs, one may have more than another
                seeds = seeds % len(ends[level])
            return ends[level][seeds][:, of].mean().item()

        for name, runs in best.items():
            if not runs.rate or runs.failed:
                continue
            scores, spent = runs.scores(y), torch.tensor(runs.spent(x, each=True)).double()
            scores = torch.cat([start.expand(len(scores), 1, -1), scores], dim=1)
            spent = torch.cat([torch.zeros(len(spent), 1).double(), spent], dim=1)
            drawn = sorted(
                crossing(spent[s].mean(0), scores[s].mean(0)[:, c].mean(1), goal(s, c))
                for s, c in zip(resamples(len(scores), 1), chosen)
            )
            low, high = (drawn[round(share * (RESAMPLES - 1))] for share in (0.025, 0.975))
            result[name] = crossing(spent.mean(0), scores.mean((0, 2)), goal()), low, high
        return result

    def queries_to_reach(
        self, level: float | str, x: str = "reward_queries", y: str = "held-out reward"
    ) -> Table:
        """`reach` as a table, with the ratio to the contestant that needs least."""
        found = self.reach(level, x, y)
        least = min((estimate for estimate, *_ in found.values()), default=math.inf)
        rows = []
        for name, (estimate, low, high) in found.items():
            times = f"{estimate / least:.1f}" if math.isfinite(estimate) and least else ""
            rows.append([name, count(estimate), f"{count(low)} to {count(high)}", times])
        what = f"{x.replace('_', ' ')} to reach {y} {level}"
        headings = ["contestant", what, "95% interval", "times the least"]
        return Table(headings, rows, headings)

    def plot(
        self,
        x: str = "reward_queries",
        y: str = "held-out reward",
        log: bool = True,
        axes: Any = None,
    ) -> Any:
        """Draw a metric over what was spent, means of seeds, as a matplotlib Figure.

        Of up to six contestants, the range from the lowest to the highest seed is shown, too.

        Contestants without training are horizontal lines: their costs are per clip.

        Args:
            x, y: what was spent, and the metric.
            log: the scale of x.
            axes: to draw into; None: a figure of its own.
        """
        from matplotlib.figure import Figure

        if axes is None:
            axes = Figure(figsize=(6.5, 4), layout="constrained").subplots()
        best = self.best()
        bands = sum(runs.rate is not None for runs in best.values()) <= MOST_BANDS
        for name, color in colors(best).items():
            runs = best[name]
            if runs.failed:
                continue
            if not runs.rate:
                axes.axhline(runs.end(y), linestyle=":", color=color, label=runs.label)
                continue
            means, spent = runs.scores(y).mean(2), runs.spent(x)
            if not log:  # all begin as the base
                start = means.new_full((len(means), 1), best[BASE].end(y))
                means, spent = torch.cat([start, means], dim=1), [0.0, *spent]
            axes.plot(spent, means.mean(0), "o-", color=color, markersize=4, label=runs.label)
            if bands:
                ends = means.amin(0), means.amax(0)
                axes.fill_between(spent, *ends, color=color, alpha=0.2, linewidth=0)
        axes.set(xlabel=x.replace("_", " "), ylabel=y, xscale="log" if log else "linear")
        axes.legend(fontsize="small")
        return axes.figure

    def pareto(
        self,
        against: Sequence[str] = ("diversity", "motion"),
        y: str = "held-out reward",
        axes: Any = None,
    ) -> Any:
        """Draw a metric against others, from the base on through each contestant's evaluations; up and right is better.

        Args:
            against, y: metrics.
            axes: to draw into, one for each of `against`; None: a figure of its own.
        """
        from matplotlib.figure import Figure

        if axes is None:
            figure = Figure(figsize=(5 * len(against), 4), layout="constrained")
            axes = figure.subplots(1, len(against), squeeze=False)[0]
        best = self.best()
        for plot, other in zip(axes, against):
            base = [best[BASE].end(name) for name in (other, y)]
            for name, color in colors(best).items():
                runs = best[name]
                if name == BASE or runs.failed:
                    continue
                path = [runs.scores(name).mean((0, 2)).tolist() for name in (other, y)]
                points = [[start, *values] for start, values in zip(base, path)]
                plot.plot(*points, "o-", markersize=4, color=color, label=runs.label)
            plot.plot(*base, "*", markersize=14, color=GRAY, label=BASE)
            plot.set(xlabel=other, ylabel=y, xscale="linear")
            plot.locator_params("x", nbins=5)
        axes[-1].legend(fontsize="small")
        return axes[-1].figure

    def __repr__(self) -> str:
        return (
            self.table().markdown()
            if BASE in self.runs()
            else f"Race({str(self.folder)!r}): not begun"
        )

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


class Runs:
    """The runs of one contestant at one learning rate: lines by seed."""

    def __init__(self, race: Race, name: str, rate: float | None, lines: list[list[dict]]):
        self.race, self.name, self.rate, self.all_lines = race, name, rate, lines
        self.failed = any("failed" in line for of_seed in lines for line in of_seed)
        parts = [{line["part"] for line in of_seed} for of_seed in lines]
        shared = set.intersection(*parts)  # while it runs, some seeds have come further
        if not shared:  # one's steps went past where another was evaluated
            lines, shared = lines[:1], parts[0]
        self.lines = [[line for line in of_seed if line["part"] in shared] for of_seed in lines]

    @property
    def ends(self) -> list[dict]:
        return [of_seed[-1] for of_seed in self.lines]

    @property
    def label(self) -> str:
        """The name, and what a clip costs beyond sampling alone."""
        queries = self.ends[0].get("per_clip", {}).get("reward_queries")
        return f"{self.name} ({queries} queries per clip)" if queries else self.name

    def scores(self, name: str) -> torch.Tensor:
        """Of a metric: (seeds, evaluations, prompts), float64."""
        metric, known = self.race.metric(name), self.ends[0]["scores"]
        if metric not in known:
            raise KeyError(f"no metric {name!r}; choose one of {', '.join(map(repr, known))}")
        unknown = {None: math.nan}  # as JSON has it
        values = [
            [[unknown.get(v, v) for v in line["scores"][metric]] for line in of_seed]
            for of_seed in self.lines
        ]
        return torch.tensor(values, dtype=torch.float64)

    def end(self, name: str) -> float:
        """The last evaluation's mean."""
        return self.scores(name)[:, -1].mean().item()

    def ended(self, name: str) -> str:
        """The last evaluation's mean in words, with the lowest and the highest seed's where there are several."""
        if self.failed:
            return "not finite"
        of_seeds = self.scores(name)[:, -1].mean(1)
        spread = f" ({of_seeds.min():.4f} to {of_seeds.max():.4f})" if len(of_seeds) > 1 else ""
        return f"{self.end(name):.4f}{spread}"

    def spent(self, cost: str, each: bool = False) -> list:
        """Costs at the evaluations: of each seed, or means."""
        if cost not in COSTS:
            raise KeyError(f"no cost {cost!r}; choose one of {', '.join(COSTS)}")
        values = [[float(line[cost]) for line in of_seed] for of_seed in self.lines]
        return values if each else torch.tensor(values).mean(0).tolist()

    def rank(self) -> tuple:
        """Higher is better; a rate at which a run was not finite is the worst."""
        if self.failed:
            return (-1, 0, 0.0)
        return (self.ends[0]["part"], len(self.ends), self.end("reward"))


def crossing(x: torch.Tensor, y: torch.Tensor, level: float) -> float:
    """Where a curve of straight lines first reaches a level; infinite if it does not."""
    level -= 1e-9  # what a mean may be off by
    if y[0] >= level:
        return float(x[0])
    reached = (y >= level).nonzero()
    if not len(reached):
        return math.inf
    i = int(reached[0])
    share = (level - y[i - 1]) / (y[i] - y[i - 1])
    return float(x[i - 1] + share * (x[i] - x[i - 1]))


def count(value: float) -> str:
    return "not reached" if math.isinf(value) else f"{value:,.0f}"
