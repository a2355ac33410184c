"""A tiny world of captioned clips: one colored shape that moves on a plain background.

Everything about a clip that a caption mentions is one of the words below, so that plain code
(`vader_nb.zoo.oracles`) can read it back off the pixels and grade any generator honestly.
Shapes are drawn from signed distance functions with an edge one pixel soft, which is what an ideal
camera would see; there is no aliasing for a model to learn.

    >>> spec = Spec("red", "star", "spinning", "white")
    >>> spec.caption
    'a red star spinning on a white background'
    >>> frames = render([spec], torch.Generator().manual_seed(0))      # (1, 8, 3, 64, 64) in [0, 1]
"""

import math
from itertools import product
from typing import NamedTuple

import torch

NUM_FRAMES, SIZE, FPS = 8, 64, 8

COLORS = {
    "red": (0.86, 0.14, 0.16),
    "yellow": (0.96, 0.87, 0.14),
    "green": (0.14, 0.66, 0.26),
    "cyan": (0.14, 0.80, 0.84),
    "blue": (0.14, 0.28, 0.88),
    "purple": (0.54, 0.18, 0.74),
    "pink": (0.97, 0.50, 0.74),
}
BACKGROUNDS = {
    "white": (0.95, 0.95, 0.95),
    "gray": (0.50, 0.50, 0.50),
    "black": (0.05, 0.05, 0.05),
    "sand": (0.85, 0.80, 0.64),
}
SHAPES = ("circle", "square", "triangle", "star")
MOTIONS = (
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "growing",
    "shrinking",
    "bouncing",
    "spinning",
)
TRAVEL = 20.0  # pixels from the first frame to the last, also the height of a bounce
SPIN = (
    16.0  # degrees a frame: less than half the 72 degrees after which a star looks the same again
)

# Circumradius of a polygon with area 1, and the degrees of rotation after which it looks the same.
STAR_INNER = 0.42
CIRCUMRADIUS = {
    "square": math.sqrt(1 / 2),
    "triangle": math.sqrt(4 / (3 * math.sqrt(3))),
    "star": math.sqrt(1 / (5 * STAR_INNER * math.sin(math.pi / 5))),
}
SYMMETRY = {"circle": None, "square": 90.0, "triangle": 120.0, "star": 72.0}


class Spec(NamedTuple):
    """What a caption says of a clip."""

    color: str
    shape: str
    motion: str
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.color} {self.shape} {self.motion} on a {self.background} background"


def specs() -> list[Spec]:
    """All 868 clips that can be told apart: a circle looks the same however it turns, so none spins."""
    every = (Spec(*words) for words in product(COLORS, SHAPES, MOTIONS, BACKGROUNDS))
    return [spec for spec in every if (spec.shape, spec.motion) != ("circle", "spinning")]


def split(held_out: int = 200) -> tuple[list[Spec], list[Spec]]:
    """(training, held-out) captions. No model of the zoo has seen a held-out one; every word and
    every pair of words of it occurs in training."""
    everything = specs()
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(2407)).tolist()
    shuffled = [everything[i] for i in order]
    return shuffled[held_out:], shuffled[:held_out]


def parse(caption: str) -> Spec | None:
    """The `Spec` that a caption of this world states, or None for any other text."""
    return _BY_CAPTION.get(" ".join(caption.lower().split()))


_BY_CAPTION = {spec.caption: spec for spec in specs()}


def polygon(shape: str) -> torch.Tensor:
    """Vertices (V, 2) of a shape with area 1, centered on its centroid, y pointing down."""
    corners = {"square": 4, "triangle": 3, "star": 10}[shape]
    angle = torch.arange(corners) * (2 * math.pi / corners) - math.pi / 2
    if shape == "square":
        angle = angle + math.pi / 4
    radius = torch.full((corners,), CIRCUMRADIUS[shape])
    if shape == "star":
        radius[1::2] *= STAR_INNER
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)


def signed_distance(points: torch.Tensor, shape: str) -> torch.Tensor:
    """Distance (...) from points (..., 2) to the outline of the shape with area 1, negative inside."""
    if shape == "circle":
        return points.norm(dim=-1) - math.sqrt(1 / math.pi)
    corners = polygon(shape)
    nearest, inside = (
        torch.full(points.shape[:-1], torch.inf),
        torch.zeros(points.shape[:-1], dtype=torch.bool),
    )
    for start, end in zip(corners, corners.roll(-1, 0)):
        edge = end - start
        x, y = (points - start).unbind(-1)
        along = ((x * edge[0] + y * edge[1]) / edge.dot(edge)).clamp(0, 1)
        nearest = torch.minimum(nearest, (x - along * edge[0]) ** 2 + (y - along * edge[1]) ** 2)
        # Crossing number: inside when a ray to the right meets the outline an odd number of times.
        crosses = (y > 0) != (y > edge[1])
        inside ^= crosses & (x * edge[1].abs() < y * edge[0] * edge[1].sign())
    return torch.where(inside, -nearest.sqrt(), nearest.sqrt())


def _paths(
    specs: list[Spec], generator: torch.Generator, num_frames: int
) -> dict[str, torch.Tensor]:
    """Center (B, F, 2), size (B, F) and angle (B, F) of each clip's shape, with a little freedom in
    all of them that the caption does not mention."""
    batch = len(specs)
    time = torch.linspace(0, 1, num_frames)  # 0 in the first frame, 1 in the last

    def jitter(spread):
        return (torch.rand(batch, 1, generator=generator) * 2 - 1) * spread

    def where(motion):
        return torch.tensor([[spec.motion == motion] for spec in specs], dtype=torch.float32)

    x, y = SIZE / 2 + jitter(1), SIZE / 2 + jitter(1)
    size = 20 + jitter(1)  # square root of the area, in pixels
    angle = jitter(5)
    x = x + TRAVEL * (time - 0.5) * (where("moving right") - where("moving left"))
    y = y + TRAVEL * (time - 0.5) * (where("moving down") - where("moving up"))
    y = y + TRAVEL * (0.5 - (math.pi * time).cos().abs()) * where("bouncing")
    size = size * torch.exp(0.9 * (time - 0.5) * (where("growing") - where("shrinking")))
    angle = angle + SPIN * (NUM_FRAMES - 1) * time * where("spinning")
    return {"center": torch.stack([x, y], dim=-1), "size": size, "angle": angle}


def coverage(
    shape: str, center: torch.Tensor, size: torch.Tensor, angle: torch.Tensor
) -> torch.Tensor:
    """How much of each pixel the shape covers, (N, SIZE, SIZE) in [0, 1].

    center (N, 2) and size (N,), the square root of the area, in pixels; angle (N,) in degrees.
    """
    pixel = torch.arange(SIZE) + 0.5
    grid = torch.stack(torch.meshgrid(pixel, pixel, indexing="xy"), dim=-1)  # (H, W, 2) as x, y
    offset = (grid - center[:, None, None]) / size[:, None, None, None]
    cos, sin = (
        (angle * math.pi / 180).cos()[:, None, None],
        (angle * math.pi / 180).sin()[:, None, None],
    )
    turned = torch.stack(
        [cos * offset[..., 0] + sin * offset[..., 1], cos * offset[..., 1] - sin * offset[..., 0]],
        dim=-1,
    )
    return (0.5 - signed_distance(turned, shape) * size[:, None, None]).clamp(0, 1)


def render(
    specs: list[Spec], generator: torch.Generator, num_frames: int = NUM_FRAMES
) -> torch.Tensor:
    """Clips of the specs: (B, F, 3, 64, 64) in [0, 1]. Same generator state, same clips."""
    path = _paths(specs, generator, num_frames)
    mask = torch.empty(len(specs), num_frames, SIZE, SIZE)
    for shape in SHAPES:
        rows = [i for i, spec in enumerate(specs) if spec.shape == shape]
        if rows:
            flat = [path[name][rows].flatten(0, 1) for name in ("center", "size", "angle")]
            mask[rows] = coverage(shape, *flat).unflatten(0, (len(rows), num_frames))
    mask = mask.unsqueeze(2)  # (B, F, 1, H, W)
    color = torch.tensor([COLORS[spec.color] for spec in specs])[:, None, :, None, None]
    background = torch.tensor([BACKGROUNDS[spec.background] for spec in specs])[
        :, None, :, None, None
    ]
    return background + mask * (color - background)


def sample(
    count: int,
    generator: torch.Generator,
    among: list[Spec] | None = None,
    num_frames: int = NUM_FRAMES,
) -> tuple[torch.Tensor, list[Spec]]:
    """`count` random clips (count, F, 3, 64, 64) with their specs, drawn from `among` (default: all)."""
    among = specs() if among is None else among
    chosen = [among[i] for i in torch.randint(len(among), (count,), generator=generator).tolist()]
    return render(chosen, generator, num_frames), chosen
