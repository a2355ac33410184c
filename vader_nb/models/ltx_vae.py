"""LTX-Video's autoencoder (`AutoencoderKLLTXVideo`, below `vae`), by itself.

Its decoder looks 22 latents back and ahead: a clip is decoded whole, its blocks computed again in the backward pass.

Decoders of 0.9.1 and later refine latents that are noised a little. That noise, and the noise that some of their
blocks draw, come from fixed seeds and are the same for all clips of one size, so scores, gradients and videos all see
the same.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx import LTXVideoResnetBlock3d
from diffusers.pipelines.ltx.pipeline_ltx import LTXPipeline
from torch import nn

# Of decoders that are told how noisy their latents are; what diffusers' documentation advises.
DECODING = {"decode_timestep": 0.05, "decode_noise_scale": 0.025}


def prepare(vae: Any) -> None:
    """Fix the noise that its blocks draw, and let them be computed again where there is a graph."""
    fix_noise(vae)
    vae.enable_gradient_checkpointing()  # acts only where there is a graph, and is exact


def decode(vae: Any, latents: torch.Tensor, settings: Mapping[str, Any]) -> torch.Tensor:
    """Frames (F, 3, H, W) in [0, 1] of one clip's latents (C, f, h, w) as the denoiser has them.

    Args:
        settings: those of `DECODING`, where the decoder is told how noisy its latents are.
    """
    config = vae.config
    mean, std = vae.latents_mean, vae.latents_std
    scaled = LTXPipeline._denormalize_latents(latents[None], mean, std, config.scaling_factor)
    timestep = None
    if config.timestep_conditioning:
        share = settings["decode_noise_scale"]
        scaled = (1 - share) * scaled + share * decode_noise(scaled)
        timestep = scaled.new_tensor([settings["decode_timestep"]], dtype=vae.dtype)
    pixels = vae.decode(scaled.to(vae.dtype), timestep).sample[0]
    return (pixels.transpose(0, 1) / 2 + 0.5).clamp(0, 1)


def decode_vjp(
    vae: Any,
    latents: torch.Tensor,
    frames: list[int],
    gradient: torch.Tensor,
    settings: Mapping[str, Any],
) -> torch.Tensor:
    """The gradient on one clip's latents, given that on `decode(vae, latents, settings)[frames]`."""
    leaf = latents.detach().requires_grad_()
    with torch.enable_grad():
        chosen = decode(vae, leaf, settings)[frames]
    return torch.autograd.grad(chosen, leaf, gradient)[0]


def decode_noise(like: torch.Tensor) -> torch.Tensor:
    """Noise of this shape, always the same, drawn on the CPU so that it is that on every device."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)


def fix_noise(vae: Any) -> None:
    """Make the decoder's blocks that draw noise draw the same in every call, even when they are recomputed."""
    blocks = [block for block in vae.decoder.modules() if isinstance(block, LTXVideoResnetBlock3d)]
    for index, block in enumerate(blocks):
        if block.per_channel_scale1 is not None:
            block.register_forward_pre_hook(partial(with_generator, index + 1))


def with_generator(seed: int, block: nn.Module, inputs: tuple) -> tuple:
    states, temb, _ = inputs
    return states, temb, torch.Generator(states.device).manual_seed(seed)
