"""The image that a Wan video continues, and how Wan 2.2 5B, which also does text to video, continues it.

Its transformer is given a timestep for each token. If the prompts have images, the encoded image replaces the first
latent in every call, with t = 0 for its tokens, and once more at the end.
"""

from dataclasses import replace
from typing import Any

import torch
from diffusers.video_processor import VideoProcessor

from ..prompts import Prompt
from . import wan_vae
from .base import Conditioning
from .svd import checked_image, resized
from .umt5 import TextByUMT5


class FromFirstFrame(TextByUMT5):
    """`Wan`'s prompts. With `expand_timesteps` they may have images, all of a batch or none."""

    expand_timesteps = False
    vae: Any

    def given_frames(self, prompts) -> int:
        shown = (getattr(prompt, "image", None) is not None for prompt in prompts)
        return int(self.expand_timesteps and all(shown))

    def texts(self, prompts) -> dict[str, list[str]]:
        if self.expand_timesteps:
            prompts = [replace(p, image=None) if isinstance(p, Prompt) else p for p in prompts]
        return super().texts(prompts)

    def encode(self, prompts, sampling: Any = None, generators=None) -> Conditioning:
        """UMT5's states by branch, and of images the first latent (B, C, 1, h, w) in all branches."""
        shown = [prompt for prompt in prompts if getattr(prompt, "image", None) is not None]
        if not shown or not self.expand_timesteps:
            return super().encode(prompts, sampling, generators)
        if len(shown) < len(prompts):
            raise ValueError(
                f"{len(shown)} of {len(prompts)} prompts have an image: in a batch, all clips start from one, or none"
            )
        assert sampling is not None
        sampling = sampling.resolve(self)
        self.latent_shape(
            sampling
        )  # what cannot be made is an error before the encoders are at work
        conditioning = super().encode(prompts, sampling, generators)
        self.onload(self.vae)
        with torch.no_grad():
            images = [self.first_frame(prompt, sampling) for prompt in prompts]
            first = torch.cat([wan_vae.encode(self.vae, image) for image in images])
        branches = conditioning.branches.items()
        return Conditioning({name: branch | {"first": first} for name, branch in branches})

    def first_frame(self, prompt, sampling) -> torch.Tensor:
        """The prompt's image as pixels (1, 3, 1, H, W) in [-1, 1], resized as in diffusers."""
        size, image = (sampling.height, sampling.width), checked_image(self.name, prompt)
        if isinstance(prompt.image, torch.Tensor):
            pixels = resized(image, size) * 2 - 1
        else:
            scale = self.vae.config.scale_factor_spatial
            pixels = VideoProcessor(vae_scale_factor=scale).preprocess(prompt.image, *size)
        return pixels.unsqueeze(2).to(self.device)

    def with_given(self, latents, conditioning) -> torch.Tensor:
        return with_first(latents, conditioning["prompt"].get("first"))

    def token_times(self, latents, t, first: torch.Tensor | None) -> torch.Tensor:
        """Timesteps (B, tokens); those of a first latent that is given are 0."""
        tokens = latents[0, 0, :, ::2, ::2]
        times = t.expand(len(latents), *tokens.shape)
        if first is not None:
            times = times.clone()
            times[:, 0] = 0
        return times.flatten(1)


def with_first(latents: torch.Tensor, first: torch.Tensor | None) -> torch.Tensor:
    """Latents (B, C, F, h, w) whose first one is this (B, C, 1, h, w), where there is one."""
    return latents if first is None else torch.cat([first.to(latents), latents[:, :, 1:]], dim=2)
