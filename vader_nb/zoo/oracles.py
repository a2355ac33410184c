"""Oracles: plain code that reads color, shape, motion and background off a clip of the tiny world.

No network is involved, so an oracle cannot be fooled the way a learned reward can: it is the judge
that no model of the zoo has been trained against. An attribute that cannot be read is None, and
None counts as wrong.

How each is read. The background is the median of the border pixels. The object is what differs from
it. Its color is the mean over its inside, named by the nearest of the palette. Its shape is the
template (of four shapes at 24 angles each, scaled to the object's area and moved to its center) with
the largest overlap. Its motion is the largest of the changes in place, area and angle over the clip.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import world

VISIBLE = 0.2  # an object must differ this much from its background, as a distance in RGB
SAME_COLOR = 0.3  # no palette color nearer than this: unreadable
MIN_AREA = 30.0  # pixels
MIN_OVERLAP = 0.70  # intersection over union with the best template
MIN_MOTION = 0.35  # of what the world's own clips move
PATCH, REACH, ANGLES = 32, 1.15, 24


class Reading(NamedTuple):
    """What the oracles see in one clip; None where nothing can be read."""

    color: str | None
    shape: str | None
    motion: str | None
    background: str | None


def _nearest(rgb: torch.Tensor, palette: dict[str, tuple], limit: float) -> list[str | None]:
    names, values = list(palette), torch.tensor(list(palette.values()))
    distance, index = torch.cdist(rgb, values).min(dim=1)
    return [names[i] if d < limit else None for d, i in zip(distance.tolist(), index.tolist())]


def _object(frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Background color (B, 3) and how much each pixel belongs to the object (B, F, H, W) in [0, 1]."""
    border = torch.cat([frames[..., :2, :].flatten(-2), frames[..., -2:, :].flatten(-2)], dim=-1)
    background = border.transpose(1, 2).flatten(2).median(dim=-1).values  # (B, 3)
    difference = (frames - background[:, None, :, None, None]).norm(dim=2)  # (B, F, H, W)
    # The inside of the object sets the scale: a mean over its brightest 2% is steadier than the maximum.
    inside = difference.flatten(1).topk(max(1, difference[0].numel() // 50), dim=1).values.mean(1)
    mask = (difference / inside.clamp(min=1e-6)[:, None, None, None]).clamp(0, 1)
    mask = ((mask - 0.25) / 0.5).clamp(0, 1)  # drop the noise of the background, keep the edge soft
    return background, mask * (inside > VISIBLE)[:, None, None, None]


def _templates() -> torch.Tensor:
    """(4 shapes, ANGLES, PATCH*PATCH) masks of area 1 on the grid [-REACH, REACH]^2."""
    axis = (torch.arange(PATCH) + 0.5) / PATCH * 2 * REACH - REACH
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    rows = []
    for shape in world.SHAPES:
        turn = torch.arange(ANGLES) / ANGLES * math.radians(world.SYMMETRY[shape] or 0.0)
        cos, sin = turn.cos()[:, None, None], turn.sin()[:, None, None]
        x, y = cos * grid[..., 0] + sin * grid[..., 1], cos * grid[..., 1] - sin * grid[..., 0]
        distance = world.signed_distance(torch.stack([x, y], dim=-1), shape)
        rows.append((0.5 - distance * PATCH / (2 * REACH)).clamp(0, 1).flatten(1))
    return torch.stack(rows)


def _overlap(mask: torch.Tensor, center: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
    """Intersection over union of each object with each template, (N, 4, ANGLES).

    mask (N, H, W), center (N, 2) and area (N,) in pixels.
    """
    height, width = mask.shape[-2:]
    axis = (torch.arange(PATCH) + 0.5) / PATCH * 2 * REACH - REACH
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)  # (P, P, 2)
    place = center[:, None, None] + grid * area.clamp(min=1).sqrt()[:, None, None, None]
    place = place / torch.tensor([width, height]) * 2 - 1
    patch = F.grid_sample(mask.unsqueeze(1), place, align_corners=False).flatten(1)  # (N, P*P)
    templates = _templates().flatten(0, 1)
    both = patch @ templates.T
    either = patch.sum(1, keepdim=True) + templates.sum(1) - both
    return (both / either.clamp(min=1e-6)).unflatten(1, (len(world.SHAPES), ANGLES))


def _turned(overlap: torch.Tensor, shape: str) -> float:
    """Degrees an object turns over a clip, from its best template angle in each frame (F, ANGLES)."""
    symmetry = world.SYMMETRY[shape]
    if symmetry is None:
        return 0.0
    angle = overlap.argmax(dim=1) * (symmetry / ANGLES)
    step = (angle.diff() + symmetry / 2) % symmetry - symmetry / 2  # the shortest way around
    return step.sum().item()


def _motion(center: torch.Tensor, area: torch.Tensor, turned: float) -> str | None:
    """Name the largest change over a clip: center (F, 2) and area (F,) in pixels, turned in degrees."""
    ends, count = (slice(0, 2), slice(-2, None)), len(center)
    middle = slice((count - 1) // 2, count // 2 + 1)
    # Of the clip, from the first two frames to the last two; what it says of fewer than 5 frames is not used.
    between = max(1, count - 2) / max(1, count - 1)
    first, last = center[ends[0]].mean(0), center[ends[1]].mean(0)
    dx, dy = ((last - first) / (world.TRAVEL * between)).tolist()
    growth = (area[ends[1]].mean() / area[ends[0]].mean()).log().item() / (2 * 0.9 * between)
    fall = (center[middle, 1].mean() - (first[1] + last[1]) / 2).item() / (world.TRAVEL * 0.7)
    spin = abs(turned) / (world.SPIN * (world.NUM_FRAMES - 1))
    amount = {
        "moving left": -dx,
        "moving right": dx,
        "moving up": -dy,
        "moving down": dy,
        "growing": growth,
        "shrinking": -growth,
        "bouncing": fall,
        "spinning": spin,
    }
    motion = max(amount, key=lambda name: amount[name])
    return motion if amount[motion] > MIN_MOTION else None


@torch.no_grad()
def read(frames: torch.Tensor) -> list[Reading]:
    """Read clips (B, F, 3, H, W) in [0, 1], F >= 5, of the tiny world's geometry (64 x 64)."""
    frames = frames.detach().float().cpu()
    batch, count, _, height, width = frames.shape
    background, mask = _object(frames)
    area = mask.sum(dim=(2, 3))  # (B, F)
    pixel_x, pixel_y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    safe = area.clamp(min=1e-6)
    center = torch.stack(
        [(mask.sum(2) * pixel_x).sum(-1) / safe, (mask.sum(3) * pixel_y).sum(-1) / safe], dim=-1
    )
    inside = (mask >= 0.99).unsqueeze(2)
    color = (frames * inside).sum(dim=(1, 3, 4)) / inside.sum(dim=(1, 3, 4)).clamp(min=1)
    overlap = _overlap(mask.flatten(0, 1), center.flatten(0, 1), area.flatten()).unflatten(
        0, (batch, count)
    )
    best = overlap.amax(dim=3).mean(dim=1)  # (B, 4)

    colors = _nearest(color, world.COLORS, SAME_COLOR)
    backgrounds = _nearest(background, world.BACKGROUNDS, SAME_COLOR)
    readings = []
    for i in range(batch):
        if area[i].min() < MIN_AREA:
            readings.append(Reading(None, None, None, backgrounds[i]))
            continue
        index = int(best[i].argmax())
        turned = _turned(overlap[i, :, index], world.SHAPES[index])
        shape = world.SHAPES[index] if best[i, index] > MIN_OVERLAP else None
        readings.append(
            Reading(colors[i], shape, _motion(center[i], area[i], turned), backgrounds[i])
        )
    return readings


def grade(frames: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
    """Which attributes of each prompt the clip shows: name -> (B,) of 0. or 1.

    Keys: color, shape, motion, background, and `color and shape` for both at once.
    Raises ValueError for a prompt that is not a caption of the tiny world: it cannot be graded.
    """
    wanted = [world.parse(prompt) for prompt in prompts]
    if None in wanted:
        raise ValueError(
            f"the oracles cannot grade {prompts[wanted.index(None)]!r}: not a caption of the tiny world, "
            f"such as {world.specs()[0].caption!r}"
        )
    seen = read(frames)
    right = {
        name: torch.tensor(
            [float(getattr(s, name) == getattr(w, name)) for s, w in zip(seen, wanted)]
        )
        for name in Reading._fields
    }
    return right | {"color and shape": right["color"] * right["shape"]}
