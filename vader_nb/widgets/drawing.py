"""Drawings as text: curves, bars against a limit, and the chain that a gradient follows.

They take the text color of the page, so light and dark themes both show them. A figure of a
plotting library would be ten times as heavy, and too slow to follow a run.
"""

import base64
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from .controls import template

BLUE, RED, GRAY = "#3b82c4", "#e0573e", "#808080"  # legible on white and on black
WIDTH, LEFT, RIGHT = 480, 10, 470  # of the chain; a phone shows it at three quarters
ADAPTER, STEPS, DECODER, FRAMES, REWARD = 4, 52, 128, 180, 232  # tops of its rows


def element(kind: str, text: str = "", **attributes) -> str:
    """An SVG element; `fill_opacity` becomes fill-opacity, and `class_` class."""
    written = ""
    for name, value in attributes.items():
        shown = f"{round(value, 2):g}" if isinstance(value, (int, float)) else escape(value)
        written += f' {name.rstrip("_").replace("_", "-")}="{shown}"'
    return f"<{kind}{written}>{escape(text)}</{kind}>"


def words(x: float, y: float, text: str, size: float = 12, anchor: str = "start", **more) -> str:
    return element("text", text, x=x, y=y, font_size=size, text_anchor=anchor, **more)


def path(points: Sequence[tuple[float, float]], **attributes) -> str:
    """A line through points, with a gap where y is not finite."""
    shape, gap = "", True
    for x, y in points:
        if math.isfinite(y):
            # h0 makes a dot of a point without neighbors.
            shape += f"M{x:.1f} {y:.1f}h0" if gap else f"L{x:.1f} {y:.1f}"
        gap = not math.isfinite(y)
    return element("path", d=shape, fill="none", **attributes)


def svg(width: float, height: float, parts: Sequence[str], label: str, max_width: int = 560) -> str:
    """A drawing for a page; `label` is its alternative text."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(label)}" fill="currentColor" stroke-linecap="round" '
        f'style="width:100%;max-width:{max_width}px;height:auto;font-family:inherit">'
        f"{''.join(parts)}</svg>"
    )


def image(drawing: str, alt: str) -> str:
    """The drawing as an <img>, since viewers of saved notebooks remove inline SVG.

    The color of a page does not reach into an image, so it is drawn in gray."""
    gray = drawing.replace("font-family:inherit", f"font-family:sans-serif;color:{GRAY}", 1)
    source = f"data:image/svg+xml;base64,{base64.b64encode(gray.encode()).decode()}"
    return f'<img src="{source}" alt="{escape(alt)}" style="width:100%;max-width:560px">'


@dataclass(frozen=True)
class Series:
    """A curve through `points` (x, y). Where y is not finite, it has a gap."""

    points: Sequence[tuple[float, float]]
    name: str = ""
    color: str = BLUE
    dashes: str = ""  # of SVG's stroke-dasharray


def chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str = "",
    y_label: str = "",
    x_range: tuple[float, float] | None = None,
    x_ticks: Sequence[float] | None = None,
    marker: float | None = None,
    width: int = 360,
    height: int = 150,
) -> str:
    """Draws curves over one x axis, each a <path class="curve">, as an <svg>.

    Args:
        series: the curves; without any finite point the drawing says "nothing yet".
        label: what is drawn; it stands above the curves and in the alternative text.
        x_label: the unit of x, to the left of the ticks.
        y_label: the unit of y, above the curves on the right.
        x_range: the ends of the x axis; by default those of the points.
        x_ticks: where numbers stand below the axis; by default at its ends.
        marker: an x with a vertical line, <path class="vader-marker">, and a dot on each curve;
            without it the dot is at the end of the curve.
        width: in units; a phone shows 360 at about their size.
        height: in units.
    """
    finite = [[point for point in curve.points if math.isfinite(point[1])] for curve in series]
    points = [point for part in finite for point in part]
    parts = [words(4, 12, label, 11, font_weight=600)]
    parts.append(words(width - 8, 12, y_label, 10, "end", opacity=0.75))
    if not points:
        parts.append(words(width / 2, height / 2, "nothing yet", 10, "middle", opacity=0.75))
        return svg(width, height, parts, f"{label}: nothing yet", 460)
    left, right = x_range or (min(points)[0], max(points)[0])
    low, high = (pick(y for _, y in points) for pick in (min, max))

    def place(x: float, y: float) -> tuple[float, float]:
        along = (x - left) / (right - left) if right > left else 0.5
        up = (y - low) / (high - low) if high > low else 0.5
        return 42 + along * (width - 52), height - 20 - up * (height - 42)

    for value in dict.fromkeys((low, (low + high) / 2, high)):
        y = place(left, value)[1]
        parts.append(path([(42, y), (width - 10, y)], stroke="currentColor", opacity=0.2))
        parts.append(words(38, y + 4, f"{value:.3g}", 10, "end", opacity=0.75))
    parts.append(words(4, height - 3, x_label, 10, opacity=0.75))
    for x in dict.fromkeys((left, right) if x_ticks is None else x_ticks):
        parts.append(words(place(x, low)[0], height - 3, f"{x:g}", 10, "middle", opacity=0.75))
    if marker is not None:
        x = place(marker, low)[0]
        ends = [(x, 18), (x, height - 16)]
        parts.append(path(ends, class_="vader-marker", stroke=GRAY, stroke_width=2))
    return svg(width, height, parts + _curves(series, marker, place), _spoken(label, series), 460)


def _curves(series: Sequence[Series], marker: float | None, place) -> list[str]:
    parts = []
    for curve in series:
        look = {"stroke": curve.color, "stroke_width": 2, "stroke_dasharray": curve.dashes}
        parts.append(path([place(*point) for point in curve.points], class_="curve", **look))
        known = [point for point in curve.points if math.isfinite(point[1])]
        dots = known[-1:] if marker is None else [point for point in known if point[0] == marker]
        for x, y in (place(*dot) for dot in dots):
            parts.append(element("circle", cx=x, cy=y, r=3, fill=curve.color))
    return parts


def _spoken(label: str, series: Sequence[Series]) -> str:
    """The curves in words: their finite ends."""
    texts = []
    for curve in series:
        known = [y for _, y in curve.points if math.isfinite(y)]
        if known:
            texts.append(f"{curve.name} from {known[0]:.3g} to {known[-1]:.3g}".strip())
    return f"{label}: {'; '.join(texts)}"


BARS = """
<table aria-label="{{ label }}" style="width:100%;max-width:560px">
<tr><th></th><th style="padding-right:{{ 100 - limit }}%">{{ limit_label }}</th><th>GiB</th></tr>
{% for name, value, end, margin in rows %}
<tr><td>{{ name }}</td><td class="bar" style="width:75%;background:
linear-gradient(90deg,transparent {{ limit }}%,#e0573e 0 calc({{ limit }}% + 2px),transparent 0),
linear-gradient(90deg,#8888 {{ end }}%,#8883 0 {{ end + margin }}%,transparent 0)"></td>
<td>{{ value }}</td></tr>
{% endfor %}
</table>
<div class=vader-note>{{ remark }}</div>
"""


def bars(values: Mapping[str, float], limit: float, margin: float, **texts: str) -> str:
    """A bar per value in GiB, and a line at the limit, as an HTML table.

    Args:
        values: by name; all are NaN while they are not known.
        limit: where the line is.
        margin: is added to the largest value, in a lighter shade.
        **texts: `label`, what the bars say in words; `limit_label`, above the line; `remark`.
    """
    known, most = math.isfinite(max(values.values())), max(values.values())
    scale = 100 / (max(limit * 1.08, most + margin) if known else limit * 1.08)
    rows = [
        (name, f"{value:.2f}", value * scale, margin * scale * (value == most))
        for name, value in values.items()
    ]
    rows = rows if known else [(name, "", 0, 0) for name in values]
    return template(BARS).render(rows=rows, limit=limit * scale, **texts)


def chain(
    steps: int,
    window: int,
    num_frames: int,
    scored: Collection[int],
    *,
    adapter: str,
    reward: str,
    recompute: bool,
    stream: bool,
    label: str,
) -> str:
    """Draws the way of a gradient from the reward to the adapter in thick arrows, as an <svg>.

    Args:
        steps: denoising steps; they are numbered from the end.
        window: how many of them learn; they are of the class "marked".
        num_frames: frames of the clip.
        scored: indices of the scored frames; they are of the class "marked".
        adapter: its name.
        reward: its name.
        recompute: whether blocks are computed again in the backward pass.
        stream: whether frames are decoded and scored one by one.
        label: the alternative text.
    """
    learning, scored_x = centers(steps)[-window:], [centers(num_frames)[i] for i in scored]
    start, last = RIGHT - window * (RIGHT - LEFT) / steps, learning[-1]
    inside = RIGHT - start > 8 * len(adapter)  # room for its name
    name_x, anchor = ((start + RIGHT) / 2, "middle") if inside else (start - 8, "end")
    kept = "their blocks computed again" if recompute else "all that they compute is kept"
    decoded = f"frames {'one by one' if stream else 'all at once'}"
    parts = [
        box(start, ADAPTER, RIGHT - start, 24),
        words(name_x, ADAPTER + 16, adapter, anchor=anchor, font_weight=600),
        *numbered_boxes(STEPS, range(steps, 0, -1), range(1, window + 1), "step"),
        *(arrow(x, STEPS - 2, x, ADAPTER + 27) for x in learning),
        arrow(last, STEPS + 34, learning[0], STEPS + 34) if window > 1 else "",
        words(LEFT, STEPS + 52, "noise → denoising steps, counted from the end", 11),
        words(LEFT, STEPS + 66, f"in the gradient: {window} of {steps}, {kept}", 11),
        arrow(last + 6, STEPS + 30, last + 6, DECODER - 2, gradient=False),
        arrow(last - 6, DECODER - 2, last - 6, STEPS + 30),
        box(LEFT, DECODER, RIGHT - LEFT, 26),
        words(WIDTH / 2, DECODER + 17, "decoder", anchor="middle", font_weight=600),
        words(RIGHT - 8, DECODER + 17, decoded if len(scored) > 1 else "one frame", 11, "end"),
        *numbered_boxes(FRAMES, range(1, num_frames + 1), [i + 1 for i in scored], "frame"),
        *(arrow(x, FRAMES - 2, x, DECODER + 29) for x in scored_x),
        *(arrow(x, REWARD - 2, x, FRAMES + 29) for x in scored_x),
        box(LEFT, REWARD, RIGHT - LEFT, 26),
        words(WIDTH / 2, REWARD + 17, f"reward: {reward}", anchor="middle", font_weight=600),
        words(LEFT, REWARD + 44, "thick arrows: the gradient; filled: what it passes through", 11),
    ]
    return svg(WIDTH, REWARD + 52, parts, label)


def centers(count: int) -> list[float]:
    """The x of so many boxes in a row."""
    return [LEFT + (i + 0.5) * (RIGHT - LEFT) / count for i in range(count)]


def numbered_boxes(y: float, numbers: Sequence[int], marked: Collection[int], kind: str) -> list:
    """A row of boxes with their numbers where there is room; marked ones are filled and ticked."""
    parts, width, roomy = [], (RIGHT - LEFT) / len(numbers), len(numbers) <= 15
    for x, number in zip(centers(len(numbers)), numbers):
        on = number in marked
        parts.append(box(x - 0.46 * width, y, 0.92 * width, 26, kind + " marked" * on, filled=on))
        if len(numbers) <= 26 or number % 5 == 0:
            text, size = f"{number}{' ✓' * (on and roomy)}", 12 if roomy else 9
            parts.append(words(x, y + 17, text, size, "middle", font_weight=600 if on else 400))
    return parts


def box(x: float, y: float, width: float, height: float, kind: str = "", filled=False) -> str:
    opacity, stroke = (0.3, 0.9) if filled else (0.05, 0.35)
    size = {"x": x, "y": y, "width": width, "height": height, "rx": 4, "fill_opacity": opacity}
    return element("rect", class_=kind, **size, stroke="currentColor", stroke_opacity=stroke)


def arrow(x: float, y: float, to_x: float, to_y: float, gradient: bool = True) -> str:
    """A thick arrow for the gradient, a thin one for what is computed forwards."""
    length, angle = math.dist((x, y), (to_x, to_y)), math.degrees(math.atan2(to_y - y, to_x - x))
    size, width, color = (6, 3, RED) if gradient else (4, 1, "currentColor")
    look = {"fill": color, "stroke": color, "stroke_width": width, "stroke_linejoin": "round"}
    shape = f"M{-length:.1f} 0H{-size}v{size / 2}L-1 0L{-size} {-size / 2}V0"
    return element(
        "path", d=shape, transform=f"translate({to_x:.1f} {to_y:.1f}) rotate({angle:.0f})", **look
    )
