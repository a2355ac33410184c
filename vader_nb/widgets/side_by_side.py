"""Contestants in columns, as HTML: one picture in which all play in step, scores, curves, heat maps."""

from collections.abc import Sequence

import torch
from matplotlib.colors import LinearSegmentedColormap, to_hex

from ..evaluate import BASE
from ..video import Video, grid
from .comparison_data import Clip, Comparison
from .panel import escape

GAP = 4  # pixels between clips
BACKGROUND = 0.25  # their gray, which is seen beside white, gray and black clips
HEAT = LinearSegmentedColormap.from_list("heat", ["#d9001a", "#ff8c00", "#ffff66"])


def joined(clips: Sequence[torch.Tensor | None], fps: int, text: str) -> Video:
    """Return clips (F, 3, H, W) side by side as one video; None: an empty place, not made yet."""
    like = next(clip for clip in clips if clip is not None)
    filled = [torch.full_like(like, BACKGROUND) if clip is None else clip for clip in clips]
    return Video(grid(torch.stack(filled), len(filled), GAP, BACKGROUND), fps, text)


def heat_overlay(clip: Clip, reward: str) -> torch.Tensor:
    """Return the frames (F, 3, H, W) in dim gray, with the heat map in color over them.

    Strength is the heat map's square root: most gradients are far below the largest, so that
    without it only a point would be seen.
    """
    gray = 0.1 + 0.5 * clip.pixels().mean(1, keepdim=True)
    strength = clip.heat_maps[reward].float().sqrt()
    color = torch.from_numpy(HEAT(strength.numpy())[..., :3]).float().movedim(-1, 1)
    return torch.lerp(gray.expand_as(color), color, (1.6 * strength[:, None]).clamp(max=1))


def heat_legend(reward: str) -> str:
    """Return what the heat map of a reward means."""
    ramp = ",".join(to_hex(HEAT(place)) for place in (0.0, 0.5, 1.0))
    bar = f"display:inline-block;width:60px;height:9px;background:linear-gradient(90deg,#333,{ramp})"
    return (
        f"<div class=vader-note>Heat map: <span style='{bar}'></span> weak to strong: how much "
        f"{escape(reward)} changes with the pixel, |∂ reward / ∂ pixel|, relative to each clip's "
        "largest. It shows where the reward looks, not what it prefers.</div>"
    )


def columns(names: Sequence[str], picture: str, *rows: Sequence[str]) -> str:
    """Return a table: names, one picture with a clip per column, and rows of cells of HTML."""
    count = len(names)
    heads = "".join(f"<th>{escape(name)}</th>" for name in names)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    style = f"table-layout:fixed;width:100%;max-width:{256 * count}px;min-width:{64 * count}px"
    return (
        f"<div class=vader-scroll><table class=vader-columns style='{style}'><tr>{heads}</tr>"
        f"<tr><td colspan={count}>{picture}</td></tr>{lines}</table></div>"
    )


def number(value: float, sign: str = "") -> str:
    return f"{round(value, 3) + 0.0:{sign}.3f}".replace("-", "−")  # no minus zero


def signed(difference: float) -> str:
    """Return a difference as HTML, with its sign and a color for it."""
    if round(difference, 3) == 0:
        return "±0.000"
    direction = "up" if difference > 0 else "down"
    return f"<span class=vader-{direction}>{number(difference, '+')}</span>"


def score_rows(comparison: Comparison, prompt: str) -> list[list[str]]:
    """Return a row per reward: scores and differences to the base; "…" for clips not made yet."""
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
