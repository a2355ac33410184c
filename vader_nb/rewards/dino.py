"""Subject consistency: what DINOv2 (arXiv 2304.07193) sees in a clip stays the same over time."""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import Dinov2Model

from .. import hub
from ..hub import StrPath
from .base import Reward, at_least_float32
from .gallery import find
from .networks import NetworkReward, preprocess

SIZE, SHORTER = 224, 256  # of the published processor; the model itself takes 518 and interpolates


class SubjectConsistency(NetworkReward):
    """The mean cosine between DINOv2's vectors of a clip's frames, with a floor under its motion.

    Without `distance` each frame is compared with the one before it and with the first, as VBench's
    subject consistency does (with DINO, whose numbers differ); with it, frames that far apart are.

    The floor is a mean change |f[t+1] - f[t]| of the pixels. A clip that moves less loses the share
    by which it falls short: a frozen one, whose cosine is 1, scores 0, like one of unrelated pictures.
    """

    unit, per_frame = "cosine", False

    def __init__(self, model: Dinov2Model, distance: int | None = None, floor: float = 0.005):
        super().__init__([model], model.encoder.layer)
        self.model, self.distance, self.floor = model, distance, floor
        self.config: Any = model.config
        self.name = "subject consistency" + (f" at {distance}" if distance else "")
        self.min_frames = (distance or 1) + 1
        self.range = (-2.0 if floor else -1.0, 1.0)

    def pixels(self, pictures: torch.Tensor) -> torch.Tensor:
        """The model's input (N, 3, size, size): the shorter side to 8/7 of it, then the center."""
        size = min(SIZE, self.config.image_size)
        shorter = size * SHORTER // SIZE
        pixels = preprocess(pictures, size, resize="crop", interpolation="bicubic", shorter=shorter)
        return pixels.to(self.dtype)

    def similarity(self, frames: torch.Tensor) -> torch.Tensor:
        """Cosines (B, F, F) of all pairs of frames (B, F, 3, H, W)."""

        def encode(pictures):
            vectors = self.model(pixel_values=self.pixels(pictures)).pooler_output
            return F.normalize(at_least_float32(vectors), dim=-1)

        vectors = self.per_picture(encode, frames)
        return vectors @ vectors.mT

    @torch.no_grad()
    def curve(self, frames: torch.Tensor) -> torch.Tensor:
        """(B, F - 1): the mean cosine of frames 1, 2, … apart, without the floor.

        Neighbors look alike even where a long clip drifts; the fall of the curve shows the drift.
        """
        pairs = self.similarity(frames)
        steps = range(1, frames.shape[1])
        return torch.stack([pairs.diagonal(d, 1, 2).mean(-1) for d in steps], dim=1)

    def scores(self, frames, prompts):
        self.check_frames(frames.shape[1])
        pairs = self.similarity(frames)
        cosine = pairs.diagonal(self.distance or 1, 1, 2).mean(-1)
        if self.distance is None:
            cosine = (cosine + pairs[:, 0, 1:].mean(-1)) / 2
        if self.floor:
            change = frames.diff(dim=1).abs().mean(dim=(1, 2, 3, 4))
            cosine = cosine - (1 - change / self.floor).relu()
        return cosine.unsqueeze(1)


def subject_consistency(
    checkpoint: StrPath = "published",
    *,
    distance: int | None = None,
    floor=0.005,
    dtype=torch.float32,
    from_config=False,
) -> Reward:
    """How alike a clip's frames look to DINOv2, at most 1. Prompts are ignored.

    It sees the central square of each frame. As a held-out metric for long clips, use
    `subject_consistency(distance=16, floor=0)`: near pairs hide what far ones show. `.curve(frames)`
    gives all distances at once.

    Args:
        checkpoint: "published" (facebook/dinov2-small, 22 M parameters, Apache-2.0), or a local
            `Dinov2Model` directory.
        distance: of the frames that are compared; None: to the one before and to the first.
        floor: the least mean change of the pixels per frame without a penalty (the slowest clips
            of the tiny world have 0.007); 0: none, and then standing still is best.

    Raises:
        ValueError: for a distance below 1 or a negative floor.
    """
    if distance is not None and distance < 1:
        raise ValueError(f"distance={distance} must be 1 frame or more, or None")
    if not floor >= 0:
        raise ValueError(f"floor={floor}, for the mean change of the pixels, must be 0 or more")
    place = find(checkpoint, "dinov2-small")
    model = hub.network(Dinov2Model, place, dtype, from_config)
    reward = SubjectConsistency(model, distance, floor)
    return reward.identified(place, floor=floor)
