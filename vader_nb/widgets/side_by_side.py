"""Contestants in columns, as HTML: one picture in which all play in step, scores beneath it, curves, heat maps."""

from collections.abc import Sequence

import torch

from ..evaluate import BASE
from ..video import Video, grid
from .contest import Clip, Contest
from .panel import escape

# Told apart by color and by dashes; the base is gray. Readable on white and on black.
LINES = (
    ("#7d8590", "2 3"),
    ("#3b82c4", ""),
    ("#d97706", "7 3"),
    ("#2f9e6e", "7 2 2 2"),
    ("#a855c7", "4 2"),
)
INK = "#7d8590"  # of axes and their texts
GAP, GROUND = (
    4,
    0.25,
)  # pixels between clips, and their gray: seen beside white clips, gray ones and black ones
NARROW = 64  # pixels a column needs on a phone; more columns than fit are reached by scrolling
HEAT = torch.tensor(
    [[0.85, 0.0, 0.1], [1.0, 0.55, 0.0], [1.0, 1.0, 0.4]]
)  # weak, middling and strong: red to yellow


def composed(clips: Sequence[torch.Tensor | None], fps: int, text: str) -> Video:
    """Clips (F, 3, H, W) beside each other as one video, so that they are in step; None: not made yet, an empty place."""
    like = next(clip for clip in clips if clip is not None)
    filled = [torch.full_like(like, GROUND) if clip is None else clip for clip in clips]
    return Video(grid(torch.stack(filled), len(filled), GAP, GROUND), fps, text)


def heated(clip: Clip, reward: str) -> torch.Tensor:
    """The frames in gray, dimmed, and on them the heat map in color, the stronger the less transparent. Square roots of
    it: most gradients are far below the largest, and one would see a point."""
    gray = 0.1 + 0.5 * clip.pixels().mean(1, keepdim=True)
    strength = clip.heat[reward].float().sqrt()[:, None]
    place = (strength * (len(HEAT) - 1)).clamp(max=len(HEAT) - 1 - 1e-4)
    below, ramp = place.long()[:, 0], HEAT.T
    color = torch.lerp(ramp[:, below], ramp[:, below + 1], place.frac()[:, 0]).movedim(0, 1)
    return torch.lerp(gray.expand_as(color), color, (1.6 * strength).clamp(max=1))


def columns(cells: Sequence[str]) -> str:
    """Cells in columns as wide as the picture's."""
    style = f"display:grid;grid-template-columns:repeat({len(cells)},minmax(0,1fr));gap:0 1%"
    return f"<div style='{style}'>{''.join(f'<div style=overflow-wrap:anywhere>{cell}</div>' for cell in cells)}</div>"


def under_names(names: Sequence[str], picture: str, *rows: str) -> str:
    """A picture with its columns' names above and rows of columns below it."""
    heads = columns([f"<b style='font-size:.85em'>{escape(name)}</b>" for name in names])
    width = f"max-width:{256 * len(names)}px;min-width:{NARROW * len(names)}px"
    return (
        f"<div class=vader-scroll><div style='{width}'>{heads}{picture}{''.join(rows)}</div></div>"
    )


def halves(left: str, right: str) -> str:
    """Clips and curve beside each other, on a phone below each other."""
    sides = f"<div style='flex:3 1 320px;min-width:0'>{left}</div><div style='flex:2 1 260px;min-width:0'>{right}</div>"
    return f"<div class=vader-side>{sides}</div>"


def number(value: float, sign: str = "") -> str:
    return f"{round(value, 3) + 0.0:{sign}.3f}".replace("-", "−")  # no minus zero


def signed(difference: float, up: str = "vader-up", down: str = "vader-down") -> str:
    """A difference with its sign, and a color for it."""
    if round(difference, 3) == 0:
        return "±0.000"
    return f"<span class={up if difference > 0 else down}>{number(difference, '+')}</span>"


def score_rows(contest: Contest, prompt: str) -> list[str]:
    """Every reward under each clip, with its difference to the base; "…" where the clip is not made yet."""
    known, rows = contest.scores_of(prompt), []
    for reward in contest.rewards:
        cells = []
        for name in contest.names:
            value = number(contest.mean(prompt, name, reward)) if name in known else "…"
            change = (
                signed(contest.difference(prompt, name, reward))
                if name != BASE and name in known
                else ""
            )
            cells.append(f"<span class=vader-note>{escape(reward)}</span><br>{value} {change}")
        rows.append(columns(cells))
    return rows


def table(contest: Contest, prompt: str, up: str = "vader-up", down: str = "vader-down") -> str:
    """The same as a table, for a page without the panel's look."""
    known = [name for name in contest.names if name in contest.scores_of(prompt)]
    lines = [f"<tr><th>reward</th>{''.join(f'<th>{escape(name)}</th>' for name in known)}</tr>"]
    for reward in contest.rewards:
        cells = [f"<td>{number(contest.mean(prompt, name, reward))}" for name in known]
        for i, name in enumerate(known):
            if name != BASE:
                cells[i] += f" ({signed(contest.difference(prompt, name, reward), up, down)})"
        lines.append(
            f"<tr><th>{escape(reward)}</th>{''.join(cell + '</td>' for cell in cells)}</tr>"
        )
    return f"<table>{''.join(lines)}</table>"


def curve(contest: Contest, prompt: str, reward: str, frame: int | None = None) -> str:
    """A reward over the frames, a line a contestant, with a marker at `frame`; its legend tells the values there, or the
    means. One sentence for a reward that has no curve."""
    known = contest.scores_of(prompt)
    series = [(name, known[name][reward].tolist()) for name in contest.names if name in known]
    if not contest.rewards[reward].per_frame:
        return f"<div class=vader-note>{escape(reward)} looks at the clip as a whole: one score a clip, no curve.</div>"
    what = f"{reward} at frame {frame + 1}" if frame is not None else f"{reward} of each frame"
    legend = "".join(entry(i, name, values, frame) for i, (name, values) in enumerate(series))
    return f"<div><b>{escape(what)}</b></div>{plot(series, reward, frame)}<div>{legend}</div>"


def entry(index: int, name: str, values: list[float], frame: int | None) -> str:
    color, dash = LINES[index % len(LINES)]
    line = f"<path d='M0 5H22' stroke='{color}' stroke-width=2 stroke-dasharray='{dash}'/>"
    value = f"mean {number(sum(values) / len(values))}" if frame is None else number(values[frame])
    return (
        f"<span style='display:inline-block;margin-right:12px'><svg width=22 height=10 aria-hidden=true>{line}</svg> "
        f"{escape(name)} <span class=vader-note>{value}</span></span>"
    )


def plot(series: list[tuple[str, list[float]]], reward: str, frame: int | None) -> str:
    """Lines over frames, by hand: a picture of a plotting library would be ten times as heavy, and there are as many as
    frames. Drawn 360 wide, which a phone shows in about this size."""
    count = len(series[0][1])
    low, high = min(min(values) for _, values in series), max(max(values) for _, values in series)
    spread = (high - low) or max(abs(high), 1.0) * 0.1
    bottom, top = low - 0.06 * spread, high + 0.06 * spread

    def x(i: float) -> float:
        return 44 + 306 * (i / (count - 1) if count > 1 else 0.5)

    def y(value: float) -> float:
        return 130 - 122 * (value - bottom) / (top - bottom)

    parts = []
    for value in (low, (low + high) / 2, high) if high > low else (low,):
        parts.append(f"<path d='M44 {y(value):.1f}H350' stroke='{INK}' stroke-opacity=.3 />")
        parts.append(f"<text x=40 y={y(value) + 4:.1f} text-anchor=end>{value:.3g}</text>")
    for i in range(0, count, -(-count // 8)):
        parts.append(f"<text x={x(i):.1f} y=146 text-anchor=middle>{i + 1}</text>")
    if frame is not None:
        parts.append(
            f"<path class=vader-marker d='M{x(frame):.1f} 4V132' stroke='{INK}' stroke-width=2 />"
        )
    for i, (_, values) in enumerate(series):
        color, dash = LINES[i % len(LINES)]
        points = " ".join(f"{x(j):.1f},{y(value):.1f}" for j, value in enumerate(values))
        parts.append(
            f"<polyline points='{points}' fill=none stroke='{color}' stroke-width=2 stroke-dasharray='{dash}'/>"
        )
        if frame is not None:
            parts.append(
                f"<circle cx={x(frame):.1f} cy={y(values[frame]):.1f} r=3.5 fill='{color}'/>"
            )
    ends = "; ".join(f"{name} from {values[0]:.3g} to {values[-1]:.3g}" for name, values in series)
    return (
        f"<svg viewBox='0 0 360 150' role=img aria-label='{escape(reward)} over {count} frames: {escape(ends)}' "
        f"style='width:100%;max-width:460px;height:auto;font-size:11px' fill='{INK}'>{''.join(parts)}</svg>"
    )


def legend(reward: str) -> str:
    """What the heat map means."""
    ramp = ",".join(
        f"rgb({', '.join(str(round(255 * part)) for part in color)})" for color in HEAT.tolist()
    )
    bar = f"<span style='display:inline-block;width:60px;height:9px;background:linear-gradient(90deg,#333,{ramp})'></span>"
    return (
        f"<div class=vader-note>Heat map: {bar} weak to strong: how much {escape(reward)} changes with the "
        f"pixel, |∂ reward / ∂ pixel|, of each clip's largest. It tells where the reward looks, not what it likes.</div>"
    )
