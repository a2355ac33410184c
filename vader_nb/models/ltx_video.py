"""LTX-Video (arXiv 2501.00103), text to video: `LTXPipeline` (0.9.0, 0.9.1) and `LTXConditionPipeline` (0.9.5 and later).

8 frames of 32 x 32 pixels are one latent, so there are few, and the denoiser takes each as a token. A clip is decoded
whole (`ltx_vae`).
"""

from copy import deepcopy
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from transformers import AutoTokenizer, T5EncoderModel

from . import ltx_vae
from .base import Conditioning
from .ltx_configs import CONDITION, PUBLISHED, PUBLISHED_091
from .t5 import TextByT5

DEFAULTS = {"num_inference_steps": 50, "guidance_scale": 3.0, "num_frames": 161, "fps": 25}
DEFAULTS |= {"height": 512, "width": 704}


class LTXVideo(TextByT5):
    """An `LTXVideoTransformer3DModel` with T5's text encoder and a temporal decoder.

    With decoders of 0.9.1 and later, `defaults["decode_timestep"]` is the noise level that they are told, and
    `defaults["decode_noise_scale"]` the share of noise in their latents.
    """

    family = "LTXPipeline"
    dtypes = {"default": torch.bfloat16}
    targets = {"transformer": ("to_q", "to_k", "to_v", "to_out.0")}
    original_names = {"patchify_proj": "proj_in", "adaln_single": "time_embed"}
    networks = {
        "transformer": LTXVideoTransformer3DModel,
        "vae": AutoencoderKLLTXVideo,
        "text_encoder": T5EncoderModel,
    }
    processors = {"tokenizer": AutoTokenizer}
    published = PUBLISHED
    sampling_options = {"fps": 25}
    option_bounds = {"fps": (1, 1000)}
    independent_frames = False
    text_tokens = 128  # T5 sees the padding among them; the denoiser does not

    def __init__(
        self, name, transformer, vae, text_encoder, tokenizer, scheduler, defaults, world=None
    ):
        self.name, self.world, self.vae = name, world, vae
        self.denoisers = {"transformer": transformer}
        self.scheduler = scheduler
        self.set_text_encoder(text_encoder, tokenizer, self.text_tokens)
        decoding = ltx_vae.DECODING if vae.config.timestep_conditioning else {}
        self.defaults = DEFAULTS | decoding | defaults
        ltx_vae.prepare(vae)

    @classmethod
    def published_for(cls, checkpoint) -> dict[str, dict]:
        own = PUBLISHED_091 if checkpoint.source.endswith("0.9.1") else {}
        return cls.published | own

    def decoders(self) -> list[nn.Module]:
        return [self.vae.decoder]

    def blocks(self) -> list[nn.Module]:
        return [
            module
            for module in self.denoiser.modules()
            if "LTXVideoTransformerBlock" in {cls.__name__ for cls in type(module).__mro__}
        ]

    # ------------------------------------------------------------------ the text

    def encode(self, prompts, sampling: Any = None, generators=None) -> Conditioning:
        """T5's states of the texts, their padding mask, and the positions of a clip's tokens."""
        columns = self.texts(prompts)
        places = self.places(sampling).expand(len(prompts), -1, -1)
        states, branches = self.text_states(prompts), {}
        for name, texts in columns.items():
            inputs = {
                "encoder_hidden_states": states[name],
                "encoder_attention_mask": self.tokens(texts).attention_mask.bool(),
                "video_coords": places,
            }
            branches[name] = {key: value.to(self.device) for key, value in inputs.items()}
        return Conditioning(branches)

    # ------------------------------------------------------------------ denoising

    def latent_shape(self, sampling) -> tuple[int, int, int, int]:
        space, time = self.vae.spatial_compression_ratio, self.vae.temporal_compression_ratio
        for name in ("height", "width"):
            value = getattr(sampling, name)
            if value < space or value % space:
                raise ValueError(
                    f"{name}={value} must be a positive multiple of {space} pixels for {self.name}"
                )
        more, rest = divmod(sampling.num_frames - 1, time)
        if rest:
            raise ValueError(
                f"num_frames={sampling.num_frames} must be 1 more than a multiple of {time} for {self.name}: "
                f"use {more * time + 1} or {(more + 1) * time + 1}"
            )
        channels = int(self.denoiser.get_parameter("proj_in.weight").shape[1])
        return channels, more + 1, sampling.height // space, sampling.width // space

    def places(self, sampling) -> torch.Tensor:
        """Seconds, and pixels from the top and from the left, of a clip's tokens: (3, tokens)."""
        _, frames, height, width = self.latent_shape(sampling)
        space = self.vae.spatial_compression_ratio
        seconds = self.first_frames(frames) / sampling.options["fps"]
        down, right = (torch.arange(count) * float(space) for count in (height, width))
        return torch.cartesian_prod(seconds, down, right).T

    def first_frames(self, count: int) -> torch.Tensor:
        return torch.arange(count) * self.vae.temporal_compression_ratio

    def new_scheduler(self, sampling):
        """A schedule with more steps at high noise for larger and longer clips, as in diffusers."""
        if not isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            raise ValueError(
                f"{self.name!r} is a rectified flow: {type(self.scheduler).__name__} cannot sample it, "
                "FlowMatchEulerDiscreteScheduler can"
            )
        scheduler: Any = deepcopy(self.scheduler)
        if sampling.num_inference_steps == 1 and scheduler.config.shift_terminal:
            raise ValueError(
                f"num_inference_steps=1 must be at least 2 for {self.name}: its schedule runs from full noise "
                f"to shift_terminal={scheduler.config.shift_terminal}"
            )
        scheduler.set_timesteps(device=self.device, **self.schedule(sampling))
        return scheduler

    def schedule(self, sampling) -> dict[str, Any]:
        """Arguments of `set_timesteps`."""
        config, steps = self.scheduler.config, sampling.num_inference_steps
        _, frames, height, width = self.latent_shape(sampling)
        lengths = config.base_image_seq_len, config.max_image_seq_len
        mu = calculate_shift(frames * height * width, *lengths, config.base_shift, config.max_shift)
        return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": mu}

    def initial_latents(self, sampling, generators) -> torch.Tensor:
        """As the base's; never in half precision, nor are the steps, as in diffusers."""
        wide = torch.promote_types(self.dtype, torch.float32)
        shape = (len(generators), *self.latent_shape(sampling))
        return randn_tensor(shape, generator=generators, device=self.device, dtype=wide)

    def predict(self, latents, t, inputs) -> torch.Tensor:
        self.onload(self.denoiser)
        tokens = latents.flatten(2).transpose(1, 2).to(self.dtype)
        output = self.denoiser(tokens, timestep=t.expand(len(tokens)), **inputs, return_dict=False)
        wide = torch.promote_types(self.dtype, torch.float32)
        return output[0].transpose(1, 2).unflatten(2, latents.shape[2:]).to(wide)

    # ------------------------------------------------------------------ decoding

    def decode(self, latents: torch.Tensor, frames: list[int] | None = None) -> torch.Tensor:
        self.onload(*self.decoders())
        clips = torch.stack([ltx_vae.decode(self.vae, clip, self.defaults) for clip in latents])
        return clips if frames is None else clips[:, frames]

    def decode_vjp(self, latents, frames, gradient, decode_chunk_size=1) -> torch.Tensor:
        """As the base's; clip by clip, each decoded once and whole, whatever `decode_chunk_size` says."""
        self.onload(*self.decoders())
        return torch.stack(
            [
                ltx_vae.decode_vjp(self.vae, clip, frames, pixels, self.defaults)
                for clip, pixels in zip(latents, gradient)
            ]
        )


class LTXCondition(LTXVideo):
    """`LTXConditionPipeline` without a condition: text alone, with steps, text and times of its own."""

    family = "LTXConditionPipeline"
    published = PUBLISHED | CONDITION
    text_tokens = 256
    masked_text = True

    def first_frames(self, count: int) -> torch.Tensor:
        return (super().first_frames(count) + 1 - self.vae.temporal_compression_ratio).clamp(min=0)

    def schedule(self, sampling) -> dict[str, Any]:
        sigmas = linear_quadratic_schedule(sampling.num_inference_steps).numpy()
        return {"sigmas": sigmas, "timesteps": sigmas * 1000}
