"""CogVideoX's autoencoder (`AutoencoderKLCogVideoX`, below `vae`), by itself.

It is causal and takes a clip in chunks of two latents, of which each is four frames. With an odd number of latents the
first chunk has three, and its first latent is a single frame.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import (
    CogVideoXResnetBlock3D,
    CogVideoXSpatialNorm3D,
    CogVideoXUpBlock3D,
)
from torch import nn

from ..offload import checkpointed
from . import causal

# One within the other: blocks keep less than the layers that they are made of, and norms are cheap.
RECOMPUTED = CogVideoXUpBlock3D, CogVideoXResnetBlock3D, CogVideoXSpatialNorm3D


def decode(vae: Any, latents: torch.Tensor, frames: Sequence[int] | None) -> torch.Tensor:
    """Frames (B, f, 3, H, W) in [0, 1] of latents (B, C, F, h, w) as the denoiser has them; of all for None."""
    parts, counts, chosen = chunks(vae, latents, frames)
    return causal.decode(partial(decode_chunk, vae), parts, None, counts, chosen)


def decode_vjp(
    vae: Any,
    latents: torch.Tensor,
    frames: Sequence[int],
    gradient: torch.Tensor,
    states: causal.States,
) -> torch.Tensor:
    """The gradient on the latents, given that on `decode(vae, latents, frames)`, see `causal.decode_vjp`."""
    leaf = latents.detach().requires_grad_()
    with torch.enable_grad():
        parts, counts, chosen = chunks(vae, leaf, frames)
    recomputed: list[nn.Module] = [x for x in vae.decoder.modules() if isinstance(x, RECOMPUTED)]
    given = [part.detach() for part in parts]
    sweep = partial(decode_chunk, vae), given, None, counts, chosen, gradient, states
    with checkpointed(recomputed):
        pulled = causal.decode_vjp(*sweep)
    (found,) = torch.autograd.grad(parts, leaf, pulled)
    return found


def chunks(
    vae: Any, latents: torch.Tensor, frames: Sequence[int] | None
) -> tuple[list[torch.Tensor], list[int], list[int]]:
    """The decoder's chunks up to the last of these frames: their latents, how many frames each makes, and
    the frames' indices."""
    count = latents.shape[2]
    pairs = [2] * (count // 2) or [0]
    pairs[0] += count % 2  # the first chunk has three, or one
    makes = [frames_of(vae, n) for n in pairs]
    every = range(sum(makes))
    chosen = list(every) if frames is None else [every[frame] for frame in frames]
    needed = next(n for n in range(len(makes) + 1) if sum(makes[:n]) > max(chosen))
    scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
    return list(scaled.split(pairs, dim=2))[:needed], makes[:needed], chosen


def frames_of(vae: Any, latents: int) -> int:
    """The number of frames that this many latents are decoded to: four each, and one for an odd one."""
    return latents // 2 * 2 * vae.config.temporal_compression_ratio + latents % 2


def decode_chunk(vae: Any, latents: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
    """Frames (B, f, 3, H, W) in [0, 1] of a chunk (B, C, 1 to 3, h, w), after the state that the chunk
    before left."""
    pixels, state = vae.decoder(latents, conv_cache=state)
    return (pixels / 2 + 0.5).clamp(0, 1).transpose(1, 2), state


def forget_unread(vae: Any) -> None:
    """Drop from each chunk's state what the next one does not read, and is large: the caches of norms'
    convolutions, which look at one frame each."""
    for module in vae.decoder.modules():
        if isinstance(module, CogVideoXSpatialNorm3D):
            module.register_forward_hook(without_cache)


def without_cache(norm: nn.Module, inputs: Any, output: Any) -> tuple[torch.Tensor, dict]:
    """A hook."""
    return output[0], {}
