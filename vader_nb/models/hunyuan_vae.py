"""HunyuanVideo's autoencoder (`AutoencoderKLHunyuanVideo`, below `vae`), by itself: other families use it too.

Clips of more than 4 latents are decoded in parts of 5, each of which begins 3 after the one before and is looked at
as a whole; where two overlap they are blended. This is what diffusers does too (`use_framewise_decoding`).
"""

from typing import Any

import torch

from ..offload import checkpointed
from .base import instances

# Of the decoder, one within the other: blocks keep less than the layers that they are made of.
RECOMPUTED = {"HunyuanVideoDecoder3D", "HunyuanVideoUpBlock3D"}
RECOMPUTED |= {"HunyuanVideoResnetBlockCausal3D", "HunyuanVideoUpsampleCausal3D"}


def decode(vae: Any, latents: torch.Tensor, frames: list[int] | None) -> torch.Tensor:
    """Frames (F, 3, H, W) in [0, 1] of one clip's latents (C, f, h, w); None: all. Decodes only the parts needed."""
    part, places = needed(vae, latents, frames)
    pixels = vae.decode(part[None].to(vae.dtype) / vae.config.scaling_factor).sample[0]
    return (pixels.transpose(0, 1)[places] / 2 + 0.5).clamp(0, 1)


def decode_vjp(
    vae: Any, latents: torch.Tensor, frames: list[int], gradient: torch.Tensor
) -> torch.Tensor:
    """The gradient on the latents, given that on `decode(vae, latents, frames)`; one part's graph is in memory."""
    leaf = latents.detach().requires_grad_()
    with torch.enable_grad(), checkpointed(instances(vae.decoder, RECOMPUTED)):
        (pulled,) = torch.autograd.grad(decode(vae, leaf, frames), leaf, gradient)
    return pulled


def needed(
    vae: Any, latents: torch.Tensor, frames: list[int] | None
) -> tuple[torch.Tensor, list[int]]:
    """The latents (C, f, h, w) that are enough to decode these frames exactly, and the frames' new indices."""
    count, time = latents.shape[1], vae.temporal_compression_ratio
    every = range((count - 1) * time + 1)
    frames = list(every) if frames is None else [every[frame] for frame in frames]
    size = vae.tile_sample_min_num_frames // time
    if not vae.use_framewise_decoding or count <= size:
        return latents, frames
    step = vae.tile_sample_stride_num_frames // time
    parts = [max(frame - 1, 0) // (step * time) for frame in frames]
    first = max(min(parts) - 1, 0)  # which the next one is blended with
    end = max(parts) * step + size + 1
    return latents[:, first * step : end], [frame - first * step * time for frame in frames]
