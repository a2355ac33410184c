"""The comparison as HTML: clips in columns, scores, curves, heat maps, and the page of an export.

Clips of a prompt are one picture, so that they play in step.
"""

import json
from collections.abc import Iterable, Sequence
from html import escape

import torch
from markupsafe import Markup
from matplotlib.colors import LinearSegmentedColormap, to_hex

from .. import report
from ..drawing import Series, chart, columns, note, number, path, table
from ..evaluation import BASE
from ..stats import MIN_PROMPTS, paired_interval
from .comparison_data import Clip, Comparison
from .player import joined
from .voting import Tally

# Contestants are told apart by color and by dashes; the base is gray. Legible on white and black.
COLORS = ("#7d8590", "#3b82c4", "#d97706", "#2f9e6e", "#a855c7")
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
        "largest. It shows where the reward looks, not what it prefers.</div>"
    )


def signed(difference: float) -> Markup:
    """A difference with its sign and a color for it."""
    if round(difference, 3) == 0:
        return Markup("±0.000")
    direction = "up" if difference > 0 else "down"
    return Markup(f"<span class=vader-{direction}>{number(difference, '+')}</span>")


def score_rows(comparison: Comparison, prompt: str) -> list[list[Markup]]:
    """A row per reward: scores and differences to the base; "…" for clips not made yet."""
    rows = []
    for reward in comparison.rewards:
        rows.append([])
        for name in comparison.names:
            text = "…"
            if name in comparison.scores[prompt]:
                text = number(comparison.mean(prompt, name, reward))
                if name != BASE:
                    text += f" {signed(comparison.difference(prompt, name, reward))}"
            rows[-1].append(Markup(f"<span class=vader-note>{escape(reward)}</span><br>{text}"))
    return rows


def curve(comparison: Comparison, prompt: str, reward: str, frame: int) -> str:
    """A reward over the frames; its legend has the values at frame 1, 2, …, or for 0 the means."""
    if not comparison.rewards[reward].per_frame:
        return note(f"{reward} looks at the clip as a whole: one score per clip, no curve.")
    series, legend = [], ""
    for i, name in enumerate(comparison.names):
        if name not in comparison.scores[prompt]:
            continue
        color, dashes = COLORS[i % len(COLORS)], DASHES[i % len(DASHES)]
        values = comparison.scores[prompt][name][reward].tolist()
        series.append(Series([*enumerate(values, 1)], name, color, dashes))
        mean = f"mean {number(comparison.mean(prompt, name, reward))}"
        value = number(values[frame - 1]) if frame else mean
        line = path([(0, 5), (22, 5)], stroke=color, stroke_width=2, stroke_dasharray=dashes)
        legend += (
            "<span style='display:inline-block;margin-right:12px'>"
            f"<svg width=22 height=10 aria-hidden=true>{line}</svg> {escape(name)} "
            f"<span class=vader-note>{value}</span></span>"
        )
    label = f"{reward} at frame {frame}" if frame else f"{reward} of each frame"
    return f"{chart(series, label=label, marker=frame or None)}<div>{legend}</div>"


def export(comparison: Comparison, tallies: Iterable[Tally]) -> str:
    """A page: means, clips with scores for all compared prompts, votes, settings."""
    compared = [prompt for prompt in comparison.prompts if comparison.is_scored(prompt)]
    if not compared:
        raise ValueError("there is nothing to export yet: comparison.run() or run_all() first")
    names, sections = comparison.names, []
    for prompt in compared:
        picture = note("Its clips were not kept: too many prompts came after it.")
        if not comparison.missing_clips(prompt):
            clips = [comparison.clips[prompt][name].pixels() for name in names]
            video = joined(clips, comparison.model.defaults["fps"], f"{', '.join(names)}: {prompt}")
            picture = video.to_html(width=256 * len(names))
        sections.append((prompt, Markup(columns(names, picture, score_rows(comparison, prompt)))))
    adapters = {name: str(path) for name, path in comparison.adapters.items()}
    settings = {"model": comparison.model.name, "adapters": adapters, "seed": comparison.seed}
    settings |= {k: v for k, v in vars(comparison.sampling).items() if v is not None}
    return report.TEMPLATES.get_template("widgets/comparison.html.j2").render(
        adapters=list(adapters),
        total=len(comparison.prompts),
        differences=Markup(_differences(comparison, compared)),
        sections=sections,
        votes=[str(tally) for tally in tallies if tally.votes],
        settings=json.dumps(settings | report.versions(), indent=2, ensure_ascii=False),
    )


def _differences(comparison: Comparison, prompts: Sequence[str]) -> str:
    """The table of mean differences to the base over prompts."""
    rows = []
    for reward in comparison.rewards:
        for name in comparison.adapters:
            changes = torch.tensor([comparison.difference(p, name, reward) for p in prompts])
            bounds = f"from {MIN_PROMPTS} prompts on"
            if len(changes) >= MIN_PROMPTS:
                bounds = " to ".join(number(bound, "+") for bound in paired_interval(changes))
            higher = f"{(changes > 0).sum()} of {len(changes)}"
            rows.append((reward, name, signed(changes.mean().item()), bounds, higher))
    head = "reward", "adapter", "mean difference", "95 % interval", "higher on"
    return table(head, rows, "class=differences")
