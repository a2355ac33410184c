"""The comparison as HTML: clips in columns, scores, curves, heat maps, and the page of an export.

Clips of a prompt are one picture, so that they play in sync.
"""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape

import torch
from markupsafe import Markup
from matplotlib.colors import LinearSegmentedColormap, to_hex

from . import race_results, report, voting
from .comparison import ALL, Clip, Comparison, View
from .drawing import Series, chart, columns, note, number, path, table
from .evaluation import BASE
from .stats import NOTES, paired_row
from .voting import Vote

# Contestants are told apart by color and by dashes; the base is gray.
DASHES = ("2 3", "", "7 3", "7 2 2 2", "4 2")
HEAT = LinearSegmentedColormap.from_list("heat", ["#d9001a", "#ff8c00", "#ffff66"])


def heat_overlay(clip: Clip, reward: str) -> torch.Tensor:
    """The frames (F, 3, H, W) in dim gray, with the heat map in color over them."""
    gray = 0.1 + 0.5 * clip.pixels().mean(1, keepdim=True)
    # Most gradients are far below the largest; without the root only a point would be seen.
    strength = clip.heat_maps[reward].float().sqrt()
    color = torch.from_numpy(HEAT(strength.numpy())[..., :3]).float().movedim(-1, 1)
    return torch.lerp(gray.expand_as(color), color, (1.6 * strength[:, None]).clamp(max=1))


def heat_legend(reward: str) -> str:
    ramp = f"linear-gradient(90deg,#333,{','.join(to_hex(HEAT(x)) for x in (0.0, 0.5, 1.0))})"
    bar = f"display:inline-block;width:60px;height:9px;background:{ramp}"
    return (
        f"<div class=vader-note>Heat map: <span style='{bar}'></span> weak to strong: how much "
        f"{escape(reward)} changes with the pixel, |∂ reward / ∂ pixel|, relative to each clip's "
        "largest value. It shows where the reward looks, not what it prefers.</div>"
    )


def signed(difference: float) -> Markup:
    """A difference with its sign and a color for it."""
    if round(difference, 3) == 0:
        return Markup("±0.000")
    direction = "up" if difference > 0 else "down"
    return Markup(f"<span class=vader-{direction}>{number(difference, '+')}</span>")


def score_rows(
    comparison: Comparison, prompt: str, names: Sequence[str], rewards: Sequence[str]
) -> list[list[Markup]]:
    """A row per reward: scores and differences from the base; "…" for clips not made yet."""
    rows = []
    for reward in rewards:
        rows.append([])
        for name in names:
            text = "…"
            if name in comparison.scores[prompt]:
                text = number(comparison.mean(prompt, name, reward))
                if name != BASE and BASE in comparison.scores[prompt]:
                    text += f" {signed(comparison.difference(prompt, name, reward))}"
            label = (
                f"<span class=vader-note>{escape(reward)}</span><br>" if len(rewards) > 1 else ""
            )
            rows[-1].append(Markup(label + text))
    return rows


def curves_of(points: Mapping[str, Sequence[tuple[float, float]]]) -> list[Series]:
    """Curves by name, each with a look of its own, also beside one that has no points yet."""
    colors = race_results.colors(points)
    looks = [(colors[name], DASHES[i % len(DASHES)]) for i, name in enumerate(points)]
    return [Series(points[name], name, *look) for name, look in zip(points, looks) if points[name]]


def legend(series: Series, value: str = "") -> str:
    """A curve's name with a piece of its line."""
    dashes = {"stroke": series.color, "stroke_width": 2, "stroke_dasharray": series.dashes}
    return (
        "<span style='display:inline-block;margin-right:12px'>"
        f"<svg width=22 height=10 aria-hidden=true>{path([(0, 5), (22, 5)], **dashes)}</svg> "
        f"{escape(series.name)} <span class=vader-note>{value}</span></span>"
    )


def curve(
    comparison: Comparison, names: Sequence[str], prompt: str, reward: str, frame: int
) -> str:
    """A reward over the frames; its legend has the values at frame 1, 2, …, or for 0 the means."""
    if not comparison.rewards[reward].per_frame:
        return note(f"{reward} looks at the clip as a whole: one score per clip, no curve.")
    scores = comparison.scores[prompt]
    made = {name: scores[name][reward].tolist() if name in scores else [] for name in names}
    series = curves_of({name: [*enumerate(values, 1)] for name, values in made.items()})
    legends = ""
    for one in series:
        mean = f"mean {number(comparison.mean(prompt, one.name, reward))}"
        legends += legend(one, number(made[one.name][frame - 1]) if frame else mean)
    label = f"{reward} at frame {frame}" if frame else f"{reward} of each frame"
    drawn = chart(series[::-1], label=label, marker=frame or None)  # the base over its equals
    return f"{drawn}<div>{legends}</div>"


def along(
    comparison: Comparison, view: View, prompts: Sequence[str], reward: str, marker: float | None
) -> str:
    """A reward over the scale of an adapter or the steps of runs, as far as their clips are there."""

    def mean(name: str) -> float:
        if any(name not in comparison.scores[prompt] for prompt in prompts):
            return math.nan
        return sum(comparison.mean(prompt, name, reward) for prompt in prompts) / len(prompts)

    places = [place for curve in view.curves.values() for place in curve.values()]
    points = {BASE: [(x, mean(BASE)) for x in (min(places), max(places))]}
    for label, names in view.curves.items():
        points[label] = [(place, mean(name)) for name, place in names.items()]
    series = curves_of(points)
    of = f", mean of these {len(prompts)} prompts" if len(prompts) > 1 else ""
    drawn = chart(series, label=f"{reward} by {view.axis}{of}", x_label=view.axis, marker=marker)
    return f"{drawn}<div>{''.join(map(legend, series))}</div>"


def results(votes: Sequence[Vote]) -> str:
    """What was won by whom, and how often each reward agrees with the votes."""
    if not votes:
        return "<div>no votes yet</div>"
    pairs = {tuple(sorted(vote.clips[2:], key=lambda name: (name == BASE, name))) for vote in votes}
    lines = [
        f"{one} against {other}: {voting.tally(votes, one, other)}" for one, other in sorted(pairs)
    ]
    if voters := sorted({vote.voter for vote in votes if vote.voter}):
        lines.append(f"voters: {', '.join(voters)}")
    rows = []
    for name, t in sorted(voting.agreement(votes).items(), key=lambda item: -item[1].rate):
        rows.append((name, f"{t.rate:.0%}", t.interval, t.votes))
    head = "agrees with the votes", "share", "95% interval", "votes"
    listed = "".join(f"<div>{escape(line)}</div>" for line in lines)
    return listed + (table(head, rows) if rows else "")


def sections(
    comparison: Comparison, elements: Mapping[str, str], names: Sequence[str], rewards: Sequence
) -> str:
    """Prompts with their pictures, by prompt, and scores."""
    text = ""
    for prompt, element in elements.items():
        body = columns(names, element, score_rows(comparison, prompt, names, rewards))
        text += f"<section>{note(prompt)}{body}</section>"
    return text


def export(comparison: Comparison, votes: Sequence[Vote]) -> str:
    """A page: means, clips with scores for all compared prompts, votes, settings."""
    c, views = comparison, {}
    for title, view in c.views.items():
        lacking = c.lacks(view.names)
        elements = {p: _playing(c, p, view.names) for p in c.prompts if p not in lacking}
        if elements:
            title = f"{title[0].upper()}{title[1:]}, {len(elements)} of {len(c.prompts)} prompts"
            views[title] = Markup(sections(c, elements, view.names, [*c.rewards]))
    if not views:
        raise ValueError("there is nothing to export yet: comparison.run() or run_all() first")
    made_by = {name: str(c.contestants[name]) for name in c.views[ALL].names[1:]}
    settings = {"model": c.model.name, "contestants": made_by, "seed": c.seed}
    settings |= {k: v for k, v in vars(c.sampling).items() if v is not None}
    return report.TEMPLATES.get_template("comparison.html.j2").render(
        names=[*made_by],
        differences=Markup(_differences(c)),
        views=views,
        votes=Markup(results(votes)) if votes else "",
        settings=json.dumps(settings | report.versions(), indent=2, ensure_ascii=False),
    )


def _playing(comparison: Comparison, prompt: str, names: Sequence[str]) -> str:
    if any((prompt, name) not in comparison.clips for name in names):
        return note("The clips of this prompt were not kept: too many newer ones were made.")
    frames = [comparison.clips[prompt, name].pixels() for name in names]
    # No Markup, which would escape the table that is put below it.
    return str(report.picture(prompt, frames, names, comparison.model.defaults["fps"]))


def _differences(comparison: Comparison) -> str:
    """The table of mean differences from the base over prompts, as `evaluate` gives them."""
    c, rows = comparison, []
    for reward in c.rewards:
        for name in c.contestants:
            prompts = [p for p, scores in c.scores.items() if {name, BASE} <= scores.keys()]
            if name != BASE and prompts:
                means = ([[c.mean(p, n, reward) for p in prompts]] for n in (BASE, name))
                base, after = map(torch.tensor, means)
                row = paired_row("", reward, base, after, name, False)
                rows.append((reward, name, *row.texts(), "*" * row.significant, row.prompts))
    if not rows:
        return ""
    head = "reward", "contestant", "base", "mean", "difference", "95% interval", "p", "wins", "", "prompts"  # fmt: skip
    return table(head, rows, "class=differences") + note(f"* {'; '.join(NOTES)}")
