"""Drawings as SVG text: curves, bars against a limit, and the chain that a gradient follows.

They take the text color of the page, so light and dark themes both show them. A figure of a plotting library would be
ten times as heavy, and too slow to follow a run.
"""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

BLUE, RED, GRAY = "#3b82c4", "#e0573e", "#808080"  # legible on white and on black
WIDTH = (
    480  # units of bars and chain; a phone shows them at three quarters, where size 12 is legible
)


# --------------------------------------------------------------------------------------- elements


def element(kind: str, text: str = "", **attributes) -> str:
    """An SVG element. `fill_opacity` becomes fill-opacity, `class_` class; numbers are rounded."""
    written = ""
    for name, value in attributes.items():
        shown = f"{round(value, 2):g}" if isinstance(value, (int, float)) else escape(value)
        written += f' {name.rstrip("_").replace("_", "-")}="{shown}"'
    return f"<{kind}{written}>{escape(text)}</{kind}>"


def words(x: float, y: float, text: str, size: float = 12, anchor: str = "start", **more) -> str:
    return element("text", text, x=x, y=y, font_size=size, text_anchor=anchor, **more)


def path(points: Sequence[tuple[float, float]], **attributes) -> str:
    """A line through points; one that is not finite interrupts it."""
    written, command = "", "M"
    for x, y in points:
        if math.isfinite(y):
            written += f"{command}{x:.1f} {y:.1f}"
            command = "L"
        else:
            command = "M"
    return element("path", d=written, fill="none", **attributes)


def svg(width: float, height: float, parts: Sequence[str], label: str, max_width: int = 560) -> str:
    """A drawing for a page; `label` says in words what it shows."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(label)}" fill="currentColor" stroke-linecap="round" '
        f'style="width:100%;max-width:{max_width}px;height:auto;font-family:inherit">'
        f"{''.join(parts)}</svg>"
    )


def image(drawing: str, alt: str) -> str:
    """The drawing as an <img>, for readers without a kernel: viewers of saved notebooks remove inline SVG.

    The color of a page does not reach into an image, so it is drawn in gray."""
    gray = drawing.replace("font-family:inherit", f"font-family:sans-serif;color:{GRAY}", 1)
    source = f"data:image/svg+xml;base64,{base64.b64encode(gray.encode()).decode()}"
    return f'<img src="{source}" alt="{escape(alt)}" style="width:100%;max-width:560px">'


# ----------------------------------------------------------------------------------------- curves


@dataclass(frozen=True)
class Series:
    """A curve through `points` (x, y). Where y is not finite, the curve has a gap."""

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
    """Draws curves over one x axis, each a <path class="curve">.

    Args:
        series: the curves; without any finite point the drawing says "nothing yet".
        label: what is drawn. It stands above the curves and, with both ends of each, in the
            alternative text.
        x_label: the unit of x, below the axis.
        y_label: the unit of y, above the axis on the right.
        x_range: the ends of the x axis; by default those of the points.
        x_ticks: where numbers stand below the axis; by default at its ends.
        marker: an x with a vertical line, <path class="vader-marker">, and a dot on each curve;
            without it the dot is at the end of the curve.
        width: units; a phone shows 360 at about their size.
        height: units.

    Returns:
        An <svg> element.
    """
    finite = [[point for point in curve.points if math.isfinite(point[1])] for curve in series]
    points = [point for part in finite for point in part]
    heading = words(4, 12, label, 11, font_weight=600)
    if not points:
        parts = [heading, words(width / 2, height / 2, "nothing yet", 10, "middle", opacity=0.7)]
        return svg(width, height, parts, f"{label}: nothing yet", 460)
    left, right = x_range or (min(points)[0], max(points)[0])
    low, high = (pick(y for _, y in points) for pick in (min, max))
    bottom = height - 16

    def place(x: float, y: float) -> tuple[float, float]:
        along = (x - left) / (right - left) if right > left else 0.5
        up = (y - low) / (high - low) if high > low else 0.5
        return 42 + along * (width - 52), bottom - 4 - up * (bottom - 26)

    faint = {"opacity": 0.75}
    parts = [heading, words(width - 8, 12, y_label, 10, "end", **faint)]
    for value in dict.fromkeys((low, (low + high) / 2, high)):
        y = place(left, value)[1]
        parts.append(path([(42, y), (width - 10, y)], stroke="currentColor", opacity=0.2))
        parts.append(words(38, y + 4, f"{value:.3g}", 10, "end", **faint))
    for x in dict.fromkeys((left, right) if x_ticks is None else x_ticks):
        parts.append(words(place(x, low)[0], height - 3, f"{x:g}", 10, "middle", **faint))
    parts.append(words(width / 2, height - 3, x_label, 10, "middle", **faint))
    if marker is not None:
        x = place(marker, low)[0]
        line = path([(x, 18), (x, bottom)], class_="vader-marker", stroke=GRAY, stroke_width=2)
        parts.append(line)
    for curve, known in zip(series, finite):
        stroke = {"stroke": curve.color, "stroke_width": 2, "stroke_dasharray": curve.dashes}
        placed = [place(x, y) for x, y in curve.points]
        parts.append(path(placed, class_="curve", **stroke))
        dots = known[-1:] if marker is None else [point for point in known if point[0] == marker]
        for x, y in (place(*dot) for dot in dots):
            parts.append(element("circle", cx=x, cy=y, r=3, fill=curve.color))
    ends = [
        f"{curve.name} from {known[0][1]:.3g} to {known[-1][1]:.3g}".strip()
        for curve, known in zip(series, finite)
        if known
    ]
    return svg(width, height, parts, f"{label}: {'; '.join(ends)}", 460)
