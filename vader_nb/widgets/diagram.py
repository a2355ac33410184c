"""Boxes, words and arrows as SVG, in the page's own color: a light page and a dark one both show them."""

import base64

from .panel import escape

WIDTH = 480  # units; a phone shows them at three quarters, where size 12 can still be read
GRADIENT = "#e0573e"  # legible on white and on black
GRAY = "#808080"  # likewise


def svg(height: float, parts: list[str], alt: str) -> str:
    """The drawing for a page, WIDTH units wide."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img" '
        f'aria-label="{escape(alt)}" fill="currentColor" stroke="none" '
        f'style="width:100%;max-width:560px;height:auto;font-family:inherit">{"".join(parts)}</svg>'
    )


def image(drawing: str, alt: str) -> str:
    """The drawing as an <img>, for readers without a kernel: viewers of saved notebooks throw inline SVG away. A page's
    color does not reach into an image, so it is drawn in gray."""
    gray = drawing.replace("font-family:inherit", f"font-family:sans-serif;color:{GRAY}", 1)
    data = base64.b64encode(gray.encode()).decode()
    return f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(alt)}" style="width:100%;max-width:560px">'


def box(
    x: float, y: float, width: float, height: float, kind: str = "", filled: bool = False
) -> str:
    """A rectangle; kind is its class, by which a test finds it."""
    fill = 0.3 if filled else 0.05
    return (
        f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill-opacity="{fill}" '
        f'stroke="currentColor" stroke-opacity="{0.9 if filled else 0.35}"/>'
    )


def words(
    x: float, y: float, text: str, size: float = 12, anchor: str = "start", bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def arrow(x: float, y: float, to_x: float, to_y: float, gradient: bool = False) -> str:
    """An arrow along an axis: thin for what is computed forwards, thick for the gradient."""
    along = (to_x > x) - (to_x < x), (to_y > y) - (to_y < y)
    size = 6 if gradient else 4
    base_x, base_y = to_x - size * along[0], to_y - size * along[1]
    across = size * 0.7 * along[1], size * 0.7 * along[0]
    corners = f"{to_x:g},{to_y:g} {base_x + across[0]:g},{base_y + across[1]:g} {base_x - across[0]:g},{base_y - across[1]:g}"
    look = (
        f'stroke="{GRADIENT}" stroke-width="3"'
        if gradient
        else 'stroke="currentColor" stroke-opacity=".5"'
    )
    fill = GRADIENT if gradient else "currentColor"
    kind = "gradient" if gradient else "forward"
    return (
        f'<path class="{kind}" d="M{x:g} {y:g}L{base_x:g} {base_y:g}" fill="none" {look}/>'
        f'<polygon points="{corners}" fill="{fill}"/>'
    )
