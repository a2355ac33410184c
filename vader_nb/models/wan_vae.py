"""Wan's autoencoder (`AutoencoderKLWan`, below `vae`), by itself: other families use it too.

It is causal and works latent by latent: the first one is a single frame, each other one 4. Its convolutions remember
the last two frames that they saw, and a frame reaches all later ones.
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
    unpatchify,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import causal

# One within the other: blocks keep less than the layers that they are made of, and norms are cheap.
RECOMPUTED = WanResidualBlock, WanResample, WanRMS_norm


class RMSNorm(WanRMS_norm):
    """diffusers' norm over channels. On a CPU its vector norm takes a quarter of a training step, and this next to nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu" or x.dtype in (torch.float16, torch.bfloat16):
            return super().forward(x)
        squares = x.square().sum(1 if self.channel_first else -1, keepdim=True)
        normalized = x * squares.clamp(min=1e-24).rsqrt() * (self.scale * self.gamma)
        return normalized + self.bias if isinstance(self.bias, torch.Tensor) else normalized


def use_quick_norms(vae: nn.Module) -> None:
    """Make diffusers' norms in an autoencoder `RMSNorm`; parameters and their names stay."""
    for module in vae.modules():
        if type(module) is WanRMS_norm:
            module.__class__ = RMSNorm


def decode(vae: Any, latents: torch.Tensor, frames: Sequence[int] | None) -> torch.Tensor:
    """Frames (B, f, 3, H, W) in [0, 1] of latents (B, C, F, h, w) as the denoiser has them; of all for None."""
    return causal.decode(*stream(vae, latents, frames))


def decode_vjp(
    vae: Any,
    latents: torch.Tensor,
    frames: Sequence[int],
    gradient: torch.Tensor,
    states: causal.States,
) -> torch.Tensor:
    """The gradient on the latents, given that on `decode(vae, latents, frames)`, see `causal.decode_vjp`."""
    clip = stream(vae, latents.detach(), frames)
    with recomputed(vae.decoder):
        pulled = causal.decode_vjp(*clip, gradient=gradient, states=states)
    return (torch.cat(pulled, dim=2) / statistics(vae, pulled[0])[1]).to(latents)


def stream(vae: Any, latents: torch.Tensor, frames: Sequence[int] | None) -> tuple:
    """The arguments of `causal.decode`."""
    latents = latents.to(vae.dtype)
    mean, scale = statistics(vae, latents)
    counts = [1] + [vae.config.scale_factor_temporal] * (latents.shape[2] - 1)
    whole = range(sum(counts))
    chosen = list(whole) if frames is None else [whole[frame] for frame in frames]
    state = [None] * vae._cached_conv_counts["decoder"]
    parts = (latents / scale + mean).split(1, dim=2)
    return partial(decode_chunk, vae), parts, state, counts, chosen


def decode_chunk(vae: Any, latent: torch.Tensor, state: list) -> tuple[torch.Tensor, list]:
    """Frames (B, f, 3, H, W) of one latent (B, C, 1, h, w), and what the convolutions remember after it."""
    cache = list(state)  # the decoder writes into the list that it is given
    first = cache[0] is None
    x = vae.post_quant_conv(latent)
    pixels = vae.decoder(x, feat_cache=cache, feat_idx=[0], first_chunk=first)
    if vae.config.patch_size is not None:
        pixels = unpatchify(pixels, vae.config.patch_size)
    # As `AutoencoderKLWan.decode` does: values beyond pass no gradient on.
    return pixels.clamp(-1, 1).transpose(1, 2) / 2 + 0.5, cache


@contextlib.contextmanager
def recomputed(decoder: nn.Module) -> Iterator[None]:
    """Inside, where there is a graph, the decoder's blocks keep only their inputs and recompute the rest in backward.

    A latent's graph takes 8 GB for 480 x 832 pixels in half precision, and 19 GB without this. diffusers' class has no
    checkpointing: its blocks write into the list of caches that they are given.
    """
    blocks = [block for block in decoder.modules() if isinstance(block, RECOMPUTED)]
    own = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = partial(recomputed_call, block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own):
            del block.forward
            if forward is not None:
                block.forward = forward


def recomputed_call(forward: Any, x: torch.Tensor, feat_cache: Any = (), feat_idx: Any = ()) -> Any:
    """A block's call, checkpointed: on a copy of the caches, which come back beside its output."""

    def run(x: torch.Tensor, *caches: Any) -> tuple[torch.Tensor, list]:
        if not caches:  # a norm
            return forward(x), []
        copies, used = list(caches), [0]
        output = forward(x, feat_cache=copies, feat_idx=used)
        return output, copies[: used[0]]

    begin = sum(feat_idx)
    options: Any = {"use_reentrant": False, "preserve_rng_state": False}
    output, written = checkpoint(run, x, *feat_cache[begin:], **options)
    if written:
        feat_cache[begin : begin + len(written)] = written
        feat_idx[0] += len(written)
    return output


def encode(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, F, h, w), as the denoiser has them and in float32 at least, of pixels (B, 3, f, H, W) in [-1, 1]."""
    latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mode()
    latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
    mean, scale = statistics(vae, latents)
    return (latents - mean) * scale


def statistics(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean, and 1 / standard deviation, of the autoencoder's latents (1, C, 1, 1, 1)."""
    names = ("latents_mean", "latents_std")
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1).to(like) for name in names)
    return mean, 1 / std
