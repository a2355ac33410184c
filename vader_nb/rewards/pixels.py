"""Rewards without weights: formulas on pixels, small enough to check by hand."""

import math

import torch
import torch.nn.functional as F

from .base import Reward

LUMA_CHROMA = ((0.299, 0.587, 0.114), (-0.1687, -0.3313, 0.5), (0.5, -0.4187, -0.0813))
# JPEG's luminance quantization at quality 50 (ITU-T T.81, table K.1).
# fmt: off
LUMINANCE = torch.tensor([
    [16, 11, 10, 16, 24, 40, 51, 61],
    [12, 12, 14, 19, 26, 58, 60, 55],
    [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62],
    [18, 22, 37, 56, 68, 109, 103, 77],
    [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101],
    [72, 92, 95, 98, 112, 100, 103, 99],
], dtype=torch.float64)
# fmt: on


class Brightness(Reward):
    """Mean of all channels of each frame, in [0, 1]."""

    name, range = "brightness", (0.0, 1.0)

    def scores(self, frames, prompts):
        return frames.mean(dim=(2, 3, 4))


class Colorfulness(Reward):
    """Hasler and Süsstrunk's metric (2003) of each frame, divided by 255: 0.2 is colorful."""

    name, range = "colorfulness", (0.0, 1.5)

    def scores(self, frames, prompts):
        red, green, blue = frames.unbind(dim=2)
        opponents = torch.stack([red - green, (red + green) / 2 - blue], dim=2).flatten(3)
        tiny = 1e-8  # the root of zero has no gradient
        spread = (opponents.var(dim=3, unbiased=False).sum(2) + tiny).sqrt()
        shift = (opponents.mean(dim=3).square().sum(2) + tiny).sqrt()
        return spread + 0.3 * shift


class Compressibility(Reward):
    """How well each frame compresses as JPEG: minus an estimate of its bits per pixel.

    An 8x8 block's transform coefficients c, divided by the quantization table q, cost about
    log2(1 + |c / q|) bits each; rounding, which has no gradient, is left out. The estimate's rank
    correlation with real JPEG files of the same quality is tested.

    Args:
        quality: 1 to 100.
    """

    name, range, unit = "compressibility", (-24.0, 0.0), "bits/pixel"

    def __init__(self, quality: int = 75):
        if not 1 <= quality <= 100:
            raise ValueError(f"JPEG quality must lie in 1..100, got {quality}")
        scale = 50 / quality if quality < 50 else 2 - quality / 50
        self.quality, self.table = quality, (LUMINANCE * scale).round().clamp(min=1)
        n = torch.arange(8.0, dtype=torch.float64)
        k = n[:, None]
        norm = torch.where(k == 0, math.sqrt(1 / 8), 0.5)
        self.transform = torch.cos(math.pi / 8 * (n + 0.5) * k) * norm

    def scores(self, frames, prompts):
        height, width = frames.shape[-2:]
        margin = (0, -width % 8, 0, -height % 8)
        planes = F.pad(frames.flatten(0, 1), margin, mode="replicate") * 255 - 128
        planes = torch.einsum("nchw,dc->ndhw", planes, frames.new_tensor(LUMA_CHROMA))
        transform, table = self.transform.to(planes), self.table.to(planes)
        blocks = planes.unfold(2, 8, 8).unfold(3, 8, 8)  # (N, 3, H/8, W/8, 8, 8)
        coefficients = transform @ blocks @ transform.T / table
        bits = torch.log2(1 + coefficients.abs()).sum(dim=(1, 2, 3, 4, 5)) / (height * width)
        return -bits.unflatten(0, frames.shape[:2])


class MotionSmoothness(Reward):
    """Minus the mean acceleration |f[t-1] - 2 f[t] + f[t+1]| of the pixels.

    If the mean change |f[t+1] - f[t]| is below `floor`, the shortfall is subtracted: otherwise a
    frozen clip is perfect.
    """

    name, range, per_frame = "motion smoothness", (-4.0, 0.0), False
    min_frames = 3

    def __init__(self, floor: float = 0.01):
        self.floor = floor

    def scores(self, frames, prompts):
        self.check_frames(frames.shape[1])
        change = frames.diff(dim=1)
        acceleration = change.diff(dim=1).abs().mean(dim=(1, 2, 3, 4))
        missing = (self.floor - change.abs().mean(dim=(1, 2, 3, 4))).relu()
        return -(acceleration + missing).unsqueeze(1)


def incompressibility(quality: int = 75) -> Reward:
    """The opposite of `compressibility`: rewards detail."""
    return (-Compressibility(quality)).renamed("incompressibility")


brightness, colorfulness = Brightness, Colorfulness
compressibility, motion_smoothness = Compressibility, MotionSmoothness
