"""Wan image to video: Wan 2.1 I2V 14B, and Wan 2.2 I2V A14B, which has two experts and no CLIP.

Both are diffusers `WanImageToVideoPipeline` directories. A clip starts from the image of its `Prompt`: the denoiser is
given the latents of a clip of that image and zeros, a mask that names the known frame, and (2.1) CLIP's tokens of it.
"""

from typing import Any

import torch
from transformers import CLIPImageProcessor, CLIPVisionModel

from . import wan_vae
from .base import Conditioning
from .svd import checked_image
from .umt5 import TEXT_LENGTH
from .wan import Wan


class WanImageToVideo(Wan):
    """`Wan` whose transformer is given an image."""

    family = "WanImageToVideoPipeline"
    networks = Wan.networks | {"image_encoder": CLIPVisionModel}
    processors = Wan.processors | {"image_processor": CLIPImageProcessor}
    optional = (*Wan.optional, "image_encoder", "image_processor")
    takes_image = True

    def __init__(self, name, defaults, world=None, **parts):
        super().__init__(name, defaults, world, **parts)
        self.image_encoder = parts.get("image_encoder")
        self.image_processor = parts.get("image_processor")
        if self.image_encoder is not None:  # its attention finds CLIP's tokens by this number
            self.text_length = TEXT_LENGTH

    @torch.no_grad()
    def encode(self, prompts, sampling: Any = None, generators=None) -> Conditioning:
        """The text's states, by branch, and in all branches the image's latents with their mask, and its tokens."""
        sampling = sampling.resolve(self)
        self.latent_shape(
            sampling
        )  # a size that cannot be made is an error before the encoders are at work
        images = [self.image_of(prompt) for prompt in prompts]
        conditioning = super().encode(prompts, sampling, generators)
        if self.expand_timesteps:
            return conditioning
        given: dict[str, torch.Tensor] = {}
        if self.image_encoder is not None:
            self.onload(self.image_encoder)
            given["encoder_hidden_states_image"] = torch.cat([self.tokens(x) for x in images])
        self.onload(self.vae)
        given["condition"] = torch.cat([self.condition(prompt, sampling) for prompt in prompts])
        return Conditioning(
            {name: branch | given for name, branch in conditioning.branches.items()}
        )

    def image_of(self, prompt) -> Any:
        """PIL's image as it is, which is resized as in diffusers; or a tensor (1, 3, H, W) in [0, 1]."""
        image = checked_image(self.name, prompt)
        return image if isinstance(prompt.image, torch.Tensor) else prompt.image

    def tokens(self, image: Any) -> torch.Tensor:
        """CLIP's tokens (1, 257, width) of an image, those of the last layer but one."""
        scale = {"do_rescale": not isinstance(image, torch.Tensor)}
        encoder, processor = self.image_encoder, self.image_processor
        assert encoder is not None and processor is not None
        pixels = processor(images=image, return_tensors="pt", **scale).pixel_values
        states = encoder(pixels.to(self.device, encoder.dtype), output_hidden_states=True)
        return states.hidden_states[-2].to(self.dtype)

    def condition(self, prompt, sampling) -> torch.Tensor:
        """(1, m + C, F, h, w): m masks, one for each frame of a latent, and the latents of image and zeros."""
        first = self.first_frame(prompt, sampling)
        later = first.new_zeros(1, 3, sampling.num_frames - 1, *first.shape[3:])
        latents = wan_vae.encode(self.vae, torch.cat([first, later], dim=2))
        count = self.vae.config.scale_factor_temporal
        mask = latents.new_zeros(1, count, *latents.shape[2:])
        mask[:, :, 0] = 1
        return torch.cat([mask, latents], dim=1)

    def predict(self, latents, t, inputs) -> torch.Tensor:
        inputs = dict(inputs)
        if not self.expand_timesteps:
            latents = torch.cat([latents, inputs.pop("condition").to(latents)], dim=1)
        return super().predict(latents, t, inputs)
