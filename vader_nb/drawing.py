"""What panels and the course show, as text: notes, tables, curves, and the chain that a gradient follows.

Drawings take the text color of the page, so light and dark themes both show them. A figure of a
plotting library would be ten times as heavy, and too slow to follow a run.
"""

import base64
import math
import mimetypes
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from markupsafe import Markup

BLUE, RED, GRAY = "#3b82c4", "#e0573e", "#808080"  # legible on white and on black
WIDTH, LEFT, RIGHT = 480, 10, 470  # of the chain; a phone shows it at three quarters


def note(text: str) -> str:
    """A text as a small line of HTML, nothing for an empty one."""
    return f"<div class=vader-note>{escape(text)}</div>" if text else ""


def code(text: str) -> str:
    """Code that one click selects."""
    return f"<div class=vader-code>{escape(text)}</div>"


def table(head: Iterable, rows: Iterable[Iterable], look: str = "") -> str:
    """A table, whose cells are escaped unless they are Markup; `look` has attributes of its tag."""
    lines = ""
    for tag, cells in [("th", head), *(("td", row) for row in rows)]:
        texts = (cell if isinstance(cell, Markup) else escape(str(cell)) for cell in cells)
        lines += f"<tr>{''.join(f'<{tag}>{text}</{tag}>' for text in texts)}</tr>"
    return f"<div class=vader-scroll><table {look}>{lines}</table></div>"


def columns(names: Sequence[str], picture: str, rows: Sequence[Sequence] = ()) -> str:
    """A picture with a clip per contestant, above their names and rows of cells."""
    size = f"max-width:{256 * len(names)}px;min-width:{64 * len(names)}px"
    fixed = "class=vader-columns style='table-layout:fixed;width:100%'"
    body = picture + table(names, rows, fixed)
    return f"<div class=vader-scroll><div style='{size}'>{body}</div></div>"


def number(value: float, sign: str = "", digits: int = 3) -> str:
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}".replace("-", "−")  # no minus zero


def data_url(data: bytes, kind: str) -> str:
    """An address that holds data of a kind such as "image/png", for an <img> or a link."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def download_link(path: Path) -> str:
    """A link that carries a file within the page."""
    kind = mimetypes.guess_type(path, strict=False)[0] or "application/octet-stream"
    url = data_url(path.read_bytes(), kind)
    return f' · <a download="{escape(path.name)}" href="{url}">download</a>'


def element(kind: str, text: str = "", **attributes) -> str:
    """An SVG element; `fill_opacity` becomes fill-opacity, and `class_` class."""
    written = ""
    for name, value in attributes.items():
        shown = f"{round(value, 2):g}" if isinstance(value, (int, float)) else escape(value)
        written += f' {name.rstrip("_").replace("_", "-")}="{shown}"'
    return f"<{kind}{written}>{escape(text)}</{kind}>"


def words(x: float, y: float, text: str, size: float = 12, anchor: str = "start", **more) -> str:
    return element("text", text, x=x, y=y, font_size=size, text_anchor=anchor, **more)


def path(points: Iterable[tuple[float, float]], **attributes) -> str:
    """A line through points, with a gap where y is not finite."""
    shape, gap = "", True
    for x, y in points:
        if math.isfinite(y):
            # h0 makes a dot of a point without neighbors.
            shape += f"M{x:.1f} {y:.1f}h0" if gap else f"L{x:.1f} {y:.1f}"
        gap = not math.isfinite(y)
    return element("path", d=shape, fill="none", **attributes)


def svg(width: float, height: float, parts: Iterable[str], label: str, max_width: int) -> str:
    """A drawing for a page; `label` is its alternative text."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(label)}" fill="currentColor" stroke-linecap="round" '
        f'style="width:100%;max-width:{max_width}px;height:auto;font-family:inherit">'
        f"{''.join(parts)}</svg>"
    )


def image(drawing: str, alt: str, max_width: int = 560) -> str:
    """The drawing as an <img>, since viewers of saved notebooks remove inline SVG."""
    # The color of a page does not reach into an image, so it is drawn in gray.
    gray = drawing.replace("font-family:inherit", f"font-family:sans-serif;color:{GRAY}", 1)
    source = data_url(gray.encode(), "image/svg+xml")
    return f'<img src="{source}" alt="{escape(alt)}" style="width:100%;max-width:{max_width}px">'


# A click on a dot chooses its label in a menu of the panel, where there is one.
CHOOSE = """
const menu = this.closest('.vader')?.querySelector('.vader-points select')
const label = event.target.dataset.label
if (menu && label) {
  menu.selectedIndex = [...menu.options].findIndex(option => option.value == label)
  menu.dispatchEvent(new Event('change', {bubbles: true}))
}
"""


@dataclass(frozen=True)
class Series:
    """A curve through `points` (x, y). Where y is not finite, it has a gap.

    A band reaches from `lows` to `highs`. Where `labels` has a text, the point is a dot that can be clicked: this
    chooses the text in the panel's menu of class "vader-points".
    """

    points: Sequence[tuple[float, float]]
    name: str = ""
    color: str = BLUE
    dashes: str = ""  # of SVG's stroke-dasharray
    lows: Sequence[float] = ()
    highs: Sequence[float] = ()
    labels: Sequence[str] = ()

    @property
    def finite(self) -> list[tuple[float, float]]:
        return [point for point in self.points if math.isfinite(point[1])]


def chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str = "",
    x_range: tuple[float, float] | None = None,
    marker: float | None = None,
    chosen: str = "",
    width: int = 360,
    height: int = 150,
) -> str:
    """Curves over one x axis, each a <path class="curve">, with a dot at `marker`, at its labels or at its end.

    The dot whose label is `chosen` has a ring.
    """
    points = [point for curve in series for point in curve.finite]
    parts, spoken = [words(4, 12, label, 11, font_weight=600)], []
    if not points:
        parts.append(words(width / 2, height / 2, "nothing yet", 10, "middle", opacity=0.75))
        return svg(width, height, parts, f"{label}: nothing yet", 460)
    left, right = x_range or (min(points)[0], max(points)[0])
    heights = [y for _, y in points] + [y for c in series for y in (*c.lows, *c.highs)]
    low, high = (extreme(filter(math.isfinite, heights)) for extreme in (min, max))

    labels = {y: f"{y + 0.0:.3g}".replace("-", "−") for y in (low, (low + high) / 2, high)}
    margin = max(42.0, 8 + 6.5 * max(map(len, labels.values())))
    room = 8 if any(curve.labels for curve in series) else 0  # for dots at the sides

    def place(x: float, y: float) -> tuple[float, float]:
        along = (x - left) / (right - left) if right > left else 0.5
        up = (y - low) / (high - low) if high > low else 0.5
        across = margin + room + along * (width - margin - 10 - 2 * room)
        return across, height - 20 - up * (height - 42)

    for value, text in labels.items():
        y = place(left, value)[1]
        parts.append(path([(margin, y), (width - 10, y)], stroke="currentColor", opacity=0.2))
        parts.append(words(margin - 4, y + 4, text, 10, "end", opacity=0.75))
    parts.append(words(4, height - 3, x_label, 10, opacity=0.75))
    for x, anchor in {left: "middle", right: "end" if right > left else "middle"}.items():
        at = width - 8 if anchor == "end" else place(x, low)[0]
        parts.append(words(at, height - 3, short(x), 10, anchor, opacity=0.75))
    if marker is not None:
        x = place(marker, low)[0]
        ends = [(x, 18), (x, height - 16)]
        parts.append(path(ends, class_="vader-marker", stroke=GRAY, stroke_width=2))
    for curve in series:
        parts += draw_curve(curve, place, marker, chosen)
        if known := curve.finite:
            spoken.append(f"{curve.name} from {known[0][1]:.3g} to {known[-1][1]:.3g}".strip())
    if room:
        parts = [f'<g onclick="{escape(CHOOSE)}">', *parts, "</g>"]
    return svg(width, height, parts, f"{label}: {'; '.join(spoken)}", 460)


def draw_curve(
    curve: Series,
    place: Callable[[float, float], tuple[float, float]],
    marker: float | None,
    chosen: str,
) -> Iterator[str]:
    """The parts of a curve, for `chart`; `place` says where a point is."""
    xs, known = [x for x, _ in curve.points], curve.finite
    band = [*zip(xs, curve.highs), *reversed([*zip(xs, curve.lows)])]
    if band and all(math.isfinite(y) for _, y in band):
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*corner) for corner in band))
        yield element("polygon", points=corners, fill=curve.color, fill_opacity=0.2)
    look = {"stroke": curve.color, "stroke_width": 2, "stroke_dasharray": curve.dashes}
    yield path([place(*point) for point in curve.points], class_="curve", **look)
    if curve.labels:
        for point, label in zip(curve.points, curve.labels):
            if label and math.isfinite(point[1]):
                yield labeled(*place(*point), label, curve.color, label == chosen)
        return
    for dot in known[-1:] if marker is None else known:
        if marker in (None, dot[0]):
            x, y = place(*dot)
            yield element("circle", cx=x, cy=y, r=3, fill=curve.color)


def labeled(x: float, y: float, label: str, color: str, chosen: bool) -> str:
    """A dot that can be clicked."""
    look = {"class_": "vader-point", "data_label": label, "style": "cursor:pointer"}
    ring = {"stroke": "currentColor", "stroke_width": 2} if chosen else {}
    dot = element("circle", cx=x, cy=y, r=6 if chosen else 4, fill=color, **ring, **look)
    return f"<g><title>{escape(label)}</title>{dot}</g>"


def short(value: float) -> str:
    """A number of an axis in a few characters."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g} M"
    return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.3g}"


def bars(values: Mapping[str, float], limit: float, margin: float, name: str, label: str) -> str:
    """A bar per value in GiB (0: not known yet), and a line at the limit of this name.

    The largest bar grows by the margin, in a lighter shade.
    """
    most = max(values.values())
    scale = 100 / max(limit * 1.08, most + margin)
    line, rows = limit * scale, []
    for stage, value in values.items():
        end = value * scale
        light = end + margin * scale if value == most > 0 else end
        look = (
            f"linear-gradient(90deg,transparent {line}%,{RED} 0 calc({line}% + 2px),transparent 0),"
            f"linear-gradient(90deg,#8888 {end}%,#8883 0 {light}%,transparent 0)"
        )
        bar = Markup(f'<div class="bar" style="min-width:200px;background:{look}">&nbsp;</div>')
        rows.append((stage, bar, f"{value:.2f}" if value else ""))
    head = "", Markup(f"<div style='padding-right:{100 - line}%'>{escape(name)}</div>"), "GiB"
    return table(head, rows, f'aria-label="{escape(label)}" style="width:100%;max-width:560px"')


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
    """The path of a gradient from the reward up to the adapter in red arrows, as an <svg>.

    The last `window` of the steps, and the scored frames (indices), are of the class "marked".
    """
    kept = "their blocks recomputed" if recompute else "all that they compute is kept"
    decoded = f"{len(scored)} frames {'one by one' if stream else 'all at once'}"
    frames = [i + 1 for i in scored]
    parts = [
        *wide_box(4, adapter),
        *boxes(54, range(steps, 0, -1), range(1, window + 1), [1], "step"),
        words(LEFT, 108, "noise → denoising steps, counted from the end", 11),
        words(LEFT, 122, f"in the gradient: {window} of {steps}, {kept}", 11),
        *wide_box(130, f"decoder: {decoded if len(scored) > 1 else 'one frame'}"),
        *boxes(180, range(1, num_frames + 1), frames, frames, "frame"),
        *wide_box(230, f"reward: {reward}"),
        words(LEFT, 274, "arrows: the gradient; filled: what it passes through", 11),
    ]
    return svg(WIDTH, 282, parts, label, 560)


def wide_box(y: float, text: str) -> tuple[str, str]:
    middle = words(WIDTH / 2, y + 17, text, anchor="middle", font_weight=600)
    return box(LEFT, y, RIGHT - LEFT), middle


def boxes(
    y: float, numbers: Sequence[int], marked: Collection[int], entered: Collection[int], kind: str
) -> list[str]:
    """A row of numbered boxes. Arrows lead up from the marked ones, and from below into those entered."""
    parts, width, roomy = [], (RIGHT - LEFT) / len(numbers), len(numbers) <= 15
    up = {"size": 16, "anchor": "middle", "fill": RED}
    for i, number in enumerate(numbers):
        x, on = LEFT + (i + 0.5) * width, number in marked
        parts.append(box(x - 0.46 * width, y, 0.92 * width, kind + " marked" * on, filled=on))
        if len(numbers) <= 26 or number % 5 == 0:
            text, size = f"{number}{' ✓' * (on and roomy)}", 12 if roomy else 9
            parts.append(words(x, y + 17, text, size, "middle", font_weight=600 if on else 400))
        if on:
            parts.append(words(x, y - 5, "▲", **up))
        if number in entered:
            parts.append(words(x, y + 44, "▲", **up))
        if kind == "step" and on and number + 1 in marked:  # on to the step before it
            parts.append(words(x - width / 2, y + 18, "◀", **up))
    return parts


def box(x: float, y: float, width: float, kind: str = "", filled: bool = False) -> str:
    opacity, stroke = (0.3, 0.9) if filled else (0.05, 0.35)
    look = {"fill_opacity": opacity, "stroke": "currentColor", "stroke_opacity": stroke}
    return element("rect", class_=kind, x=x, y=y, width=width, height=26, rx=4, **look)
