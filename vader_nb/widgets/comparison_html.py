"""The comparison as HTML: clips in columns, scores, curves, heat maps, and the page of an export.

Clips of a prompt are one picture, so that they play in step.
"""

import json
from collections.abc import Sequence

import torch
from markupsafe import Markup
from matplotlib.colors import LinearSegmentedColormap, to_hex

from .. import report
from ..evaluation import BASE
from ..stats import MIN_PROMPTS, paired_interval
from ..video import Video, grid
from .comparison_data import Clip, Comparison
from .controls import template
from .drawing import Series, chart, path
from .panel import escape, note
from .voting import Tally

# Contestants are told apart by color and by dashes; the base is gray. Legible on white and black.
COLORS = ("#7d8590", "#3b82c4", "#d97706", "#2f9e6e", "#a855c7")
DASHES = ("2 3", "", "7 3", "7 2 2 2", "4 2")
GAP = 4  # pixels between clips
BACKGROUND = 0.25  # their gray, which is seen beside white, gray and black clips
HEAT = LinearSegmentedColormap.from_list("heat", ["#d9001a", "#ff8c00", "#ffff66"])

# Added to the report's style. On a phone a table scrolls; it does not break names into letters.
STYLE = """
section :is(td, th) { text-align: left; white-space: normal; border: 0; padding: .1rem 0 }
.text { min-width: 4.5rem }
.vader-note { color: var(--note); font-size: .85rem }
.vader-up { color: var(--good) } .vader-down { color: var(--bad) } .vader-scroll { overflow-x: auto }
"""
EXPORT = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>vader_nb comparison</title><style>{{ style }}</style></head><body>
<h1>{{ "Base against " ~ adapters|join(", ") if adapters else "Base" }}</h1>
<p>{{ sections|length }} of {{ total }} prompts. Side by side: the same prompt, the same noise; they
play in step. Beside an adapter's score: its difference to the base.</p>
{% if adapters %}
<h2>Differences to the base</h2>
<div class="scroll"><table>
<tr><th class="text">reward<th class="text">adapter<th>mean difference<th>95 % interval<th>higher on
{% for reward, name, mean, bounds, higher in means %}
<tr><td class="text">{{ reward }}<td class="text">{{ name }}
<td>{{ mean }}<td>{{ bounds }}<td>{{ higher }}
{% endfor %}
</table></div>
{% endif %}
<h2>Prompts</h2>
{% for prompt, body in sections %}
<section><p>{{ prompt }}</p>{{ body }}</section>
{% endfor %}
{% if votes %}
<h2>Blind votes</h2><ul>{% for tally in votes %}<li>{{ tally }}.{% endfor %}</ul>
{% endif %}
<h2>Settings</h2><pre>{{ settings }}</pre></body></html>
"""


def joined(clips: Sequence[torch.Tensor | None], fps: int, text: str) -> Video:
    """Clips (F, 3, H, W) side by side as one video; None: an empty place, not made yet."""
    like = next(clip for clip in clips if clip is not None)
    filled = [torch.full_like(like, BACKGROUND) if clip is None else clip for clip in clips]
    return Video(grid(torch.stack(filled), len(filled), GAP, BACKGROUND), fps, text)


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


def columns(names: Sequence[str], picture: str, *rows: Sequence[str]) -> str:
    """A table: names, one picture with a clip per column, and rows of cells of HTML."""
    count = len(names)
    heads = "".join(f"<th align=left>{escape(name)}</th>" for name in names)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    width = f"width:100%;max-width:{256 * count}px;min-width:{64 * count}px"
    return (
        "<div class=vader-scroll><table class=vader-columns "
        f"style='table-layout:fixed;{width}'><tr>{heads}</tr>"
        f"<tr><td colspan={count}>{picture}</td></tr>{lines}</table></div>"
    )


def number(value: float, sign: str = "") -> str:
    return f"{round(value, 3) + 0.0:{sign}.3f}".replace("-", "−")  # no minus zero


def signed(difference: float) -> str:
    """A difference as HTML, with its sign and a color for it."""
    if round(difference, 3) == 0:
        return "±0.000"
    direction = "up" if difference > 0 else "down"
    return f"<span class=vader-{direction}>{number(difference, '+')}</span>"


def score_rows(comparison: Comparison, prompt: str) -> list[list[str]]:
    """A row per reward: scores and differences to the base; "…" for clips not made yet."""
    rows = []
    for reward in comparison.rewards:
        row = []
        for name in comparison.names:
            text = "…"
            if name in comparison.scores_of(prompt):
                text = number(comparison.mean(prompt, name, reward))
                if name != BASE:
                    text += f" {signed(comparison.difference(prompt, name, reward))}"
            row.append(f"<span class=vader-note>{escape(reward)}</span><br>{text}")
        rows.append(row)
    return rows


def curve(comparison: Comparison, prompt: str, reward: str, frame: int | None = None) -> str:
    """A reward over the frames; its legend has the values at `frame`, or the means."""
    if not comparison.rewards[reward].per_frame:
        return note(f"{reward} looks at the clip as a whole: one score per clip, no curve.")
    series, legend, count = [], "", 1
    for i, name in enumerate(comparison.names):
        if name not in comparison.scores_of(prompt):
            continue
        color, dashes = COLORS[i % len(COLORS)], DASHES[i % len(DASHES)]
        values = comparison.scores[prompt][name][reward].tolist()
        count = len(values)
        series.append(Series([*enumerate(values, 1)], name, color, dashes))
        value = f"mean {number(sum(values) / count)}" if frame is None else number(values[frame])
        line = path([(0, 5), (22, 5)], stroke=color, stroke_width=2, stroke_dasharray=dashes)
        legend += (
            "<span style='display:inline-block;margin-right:12px'>"
            f"<svg width=22 height=10 aria-hidden=true>{line}</svg> {escape(name)} "
            f"<span class=vader-note>{value}</span></span>"
        )
    label = f"{reward} of each frame" if frame is None else f"{reward} at frame {frame + 1}"
    ticks, marker = range(1, count + 1, -(-count // 8)), None if frame is None else frame + 1
    return f"{chart(series, label=label, x_ticks=ticks, marker=marker)}<div>{legend}</div>"


def export(comparison: Comparison, prompts: Sequence[str], tallies: Sequence[Tally]) -> str:
    """A page: means, clips with scores for all compared prompts, votes, settings."""
    compared = [prompt for prompt in prompts if comparison.is_scored(prompt)]
    if not compared:
        raise ValueError("there is nothing to export yet: comparison.run() or run_all() first")
    adapters = {name: str(path) for name, path in comparison.adapters.items()}
    settings = {"model": comparison.model.name, "adapters": adapters, "seed": comparison.seed}
    settings |= {k: v for k, v in vars(comparison.sampling).items() if v is not None}
    return template(EXPORT).render(
        style=Markup(report.STYLE + STYLE),
        adapters=list(adapters),
        total=len(prompts),
        means=_means(comparison, compared),
        sections=[(prompt, Markup(_section(comparison, prompt))) for prompt in compared],
        votes=[str(tally) for tally in tallies if tally.votes],
        settings=json.dumps(settings | report.versions(), indent=2, ensure_ascii=False),
    )


def _section(comparison: Comparison, prompt: str) -> str:
    """Clips and scores of a prompt."""
    names, clips = comparison.names, comparison.clips_of(prompt)
    picture = "<p class=note>Its clips were not kept: too many prompts came after it.</p>"
    if len(clips) == len(names):
        frames = [clips[name].pixels() for name in names]
        video = joined(frames, comparison.model.defaults["fps"], f"{', '.join(names)}: {prompt}")
        picture = video.to_html(width=256 * len(names))
    return columns(names, picture, *score_rows(comparison, prompt))


def _means(comparison: Comparison, prompts: Sequence[str]) -> list[tuple]:
    """Rows of the table of mean differences over prompts."""
    rows = []
    for reward in comparison.rewards:
        for name in comparison.adapters:
            changes = torch.tensor([comparison.difference(p, name, reward) for p in prompts])
            bounds = f"from {MIN_PROMPTS} prompts on"
            if len(changes) >= MIN_PROMPTS:
                bounds = " to ".join(number(bound, "+") for bound in paired_interval(changes))
            higher = f"{(changes > 0).sum()} of {len(changes)}"
            rows.append((reward, name, Markup(signed(changes.mean().item())), bounds, higher))
    return rows
