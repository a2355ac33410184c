"""Curves as inline SVG, drawn quickly enough to follow a run, in colours that a light page and a dark one both show."""

from collections.abc import Mapping, Sequence

from .panel import escape

COLOURS = ("#3b82c4", "#d97706", "#1f9d4d", "#a855f7", "#db2777", "#0d9488")
WIDTH, HEIGHT = 230, 104
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 20, 16  # margins of the plot

Point = tuple[float, float]


def chart(
    title: str,
    lines: Mapping[str, Sequence[Point]],
    marker: float | None = None,
    xlabel: str = "",
    across: tuple[float, float] | None = None,
) -> str:
    """Lines through points (x, y) in one frame, with the range of y, and a vertical line at x = marker. Points that are
    not finite are left out. across: the range of x, default that of the points. Without any point the frame says so."""
    lines = {name: [(x, y) for x, y in points if abs(y) < float("inf")] for name, points in lines.items()}
    every = [point for points in lines.values() for point in points]
    said = "; ".join(f"{name} ends at {points[-1][1]:.3g}" for name, points in lines.items() if points) or "nothing yet"
    body = [f'<text x="4" y="12" font-size="11" font-weight="600">{escape(title)}</text>']
    if every:
        body += _plot(lines, every, marker, xlabel, across)
    else:
        body.append(f'<text x="{LEFT}" y="{HEIGHT / 2}" font-size="10" opacity=".7">nothing yet</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}: {said}")}" fill="currentColor" '
        f'style="width:100%;max-width:420px;height:auto;font-family:inherit">{"".join(body)}</svg>'
    )


def _plot(lines, every, marker, xlabel, across) -> list[str]:
    (left, right), (low, high) = ((min(v), max(v)) for v in zip(*every))
    left, right = across or (left, right)

    def at(x: float, y: float) -> tuple[float, float]:
        along = (x - left) / (right - left) if right > left else 0.5
        up = (y - low) / (high - low) if high > low else 0.5
        return (
            round(LEFT + along * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1),
        )

    bottom, small = HEIGHT - BOTTOM, 'font-size="10" opacity=".75"'
    parts = [
        f'<path d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}" fill="none" stroke="currentColor" opacity=".35"/>',
        f'<text x="{LEFT - 3}" y="{TOP + 8}" text-anchor="end" {small}>{high:.3g}</text>',
        f'<text x="{LEFT - 3}" y="{bottom}" text-anchor="end" {small}>{low:.3g}</text>' if high > low else "",
        f'<text x="{LEFT}" y="{HEIGHT - 4}" {small}>{left:g}</text>',
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end" {small}>{right:g}</text>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 4}" text-anchor="middle" {small}>{escape(xlabel)}</text>',
    ]
    for points, colour in zip(lines.values(), COLOURS):
        places = [at(*point) for point in points]
        path = " ".join(f"{x},{y}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="2.4" fill="{colour}"/>' for x, y in places[-1:]]
    if marker is not None:
        x, _ = at(marker, low)
        parts.append(f'<path d="M{x} {TOP}V{bottom}" stroke="currentColor" stroke-dasharray="3 2"/>')
    if len(lines) > 1:  # which is which, in the lines' order and colours
        names = "".join(f'<tspan fill="{c}" dx="8">■ {escape(n)}</tspan>' for n, c in zip(lines, COLOURS))
        parts.append(f'<text x="{WIDTH - RIGHT}" y="12" text-anchor="end" font-size="9">{names}</text>')
    return parts
