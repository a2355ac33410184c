"""A run's curves as inline SVG, drawn quickly enough to follow a run, in colors that a light page and a dark one both show."""

from collections.abc import Sequence

from .panel import escape

COLOR = "#3b82c4"
WIDTH, HEIGHT = 230, 104
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 20, 16  # margins of the plot

Point = tuple[float, float]


def chart(title: str, points: Sequence[Point], across: tuple[float, float]) -> str:
    """A line through points (step, y) in a frame with the range of y. Points that are not finite are left out; without any
    the frame says so. across: the range of steps, so that charts under each other have one."""
    points = [(x, y) for x, y in points if abs(y) < float("inf")]
    said = f"{title} ends at {points[-1][1]:.3g}" if points else "nothing yet"
    body = [f'<text x="4" y="12" font-size="11" font-weight="600">{escape(title)}</text>']
    if points:
        body += _plot(points, *across)
    else:
        body.append(
            f'<text x="{LEFT}" y="{HEIGHT / 2}" font-size="10" opacity=".7">nothing yet</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(f"{title}: {said}")}" fill="currentColor" '
        f'style="width:100%;max-width:420px;height:auto;font-family:inherit">{"".join(body)}</svg>'
    )


def _plot(points: Sequence[Point], left: float, right: float) -> list[str]:
    low, high = (function(y for _, y in points) for function in (min, max))

    def at(x: float, y: float) -> str:
        along = (x - left) / (right - left) if right > left else 0.5
        up = (y - low) / (high - low) if high > low else 0.5
        place = (
            LEFT + along * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
        )
        return ",".join(f"{round(number, 1)}" for number in place)

    bottom, small = HEIGHT - BOTTOM, 'font-size="10" opacity=".75"'
    end = at(*points[-1]).split(",")
    return [
        f'<path d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}" fill="none" stroke="currentColor" opacity=".35"/>',
        f'<text x="{LEFT - 3}" y="{TOP + 8}" text-anchor="end" {small}>{high:.3g}</text>',
        f'<text x="{LEFT - 3}" y="{bottom}" text-anchor="end" {small}>{low:.3g}</text>'
        if high > low
        else "",
        f'<text x="{LEFT}" y="{HEIGHT - 4}" {small}>{left:g}</text>',
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end" {small}>{right:g}</text>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 4}" text-anchor="middle" {small}>step</text>',
        f'<polyline points="{" ".join(at(*p) for p in points)}" fill="none" stroke="{COLOR}" stroke-width="1.8"/>',
        f'<circle cx="{end[0]}" cy="{end[1]}" r="2.4" fill="{COLOR}"/>',
    ]
