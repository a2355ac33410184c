"""LTX-Video (arXiv 2501.00103), text to video: `LTXPipeline` (0.9.0, 0.9.1) and `LTXConditionPipeline` (0.9.5 and later).

8 frames of 32 x 32 pixels are one latent, so there are few, and the denoiser takes each as a token. The decoder looks
22 latents back and ahead: a clip is decoded whole, its blocks computed again in the backward pass.
"""

from copy import deepcopy
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from diffusers.pipelines.ltx.pipeline_ltx import LTXPipeline, calculate_shift
from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from transformers import AutoTokenizer, T5EncoderModel

from .base import Conditioning, cached, warn_truncated
from .ltx_parts import CONDITION, PUBLISHED, PUBLISHED_091, decode_noise, fix_noise
from .parts import ModelOfParts
from .texts import TextOnDisk

CACHED_PROMPTS = 250  # prompts whose embeddings a model keeps: 1 or 2 MB each in half precision
DEFAULTS = {"num_inference_steps": 50, "guidance_scale": 3.0, "num_frames": 161, "fps": 25}
DEFAULTS |= {"height": 512, "width": 704}
# Of decoders that are told how noisy their latents are; what diffusers' documentation advises.
DECODING = {"decode_timestep": 0.05, "decode_noise_scale": 0.025}


class LTXVideo(TextOnDisk, ModelOfParts):
    """An `LTXVideoTransformer3DModel` with T5's text encoder and a decoder that knows time.

    Decoders of 0.9.1 and later refine latents that are noised a little: `defaults["decode_timestep"]` is the noise level
    that they are told, `defaults["decode_noise_scale"]` the noise's share. That noise, and what some blocks draw, come
    from fixed seeds and are the same for all clips of one size: scores, their gradients and videos see the same.
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
    text_tokens = 128
    masked_text = False  # T5 sees the padding; the denoiser does not

    def __init__(
        self, name, transformer, vae, text_encoder, tokenizer, scheduler, defaults, world=None
    ):
        self.name, self.world, self.vae = name, world, vae
        self.denoisers = {"transformer": transformer}
        self.text_encoder, self.tokenizer, self.scheduler = text_encoder, tokenizer, scheduler
        decoding = DECODING if vae.config.timestep_conditioning else {}
        self.defaults = DEFAULTS | decoding | defaults
        self._embeddings: dict[str, torch.Tensor] = {}  # on the CPU
        fix_noise(vae)
        vae.enable_gradient_checkpointing()  # acts only where there is a graph, and is exact

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
        """T5's states of the texts, which of them are padding, and where the tokens of a clip stand."""
        columns = self.texts(prompts)
        places = self.places(sampling).expand(len(prompts), -1, -1)
        self.encode_texts(prompts)
        both = columns["prompt"] + columns["negative"]
        known = cached(self._embeddings, both, self._embed, CACHED_PROMPTS)
        branches = {}
        for name, texts in columns.items():
            inputs = {
                "encoder_hidden_states": torch.stack([known[text] for text in texts]),
                "encoder_attention_mask": self.tokens(texts).attention_mask.bool(),
                "video_coords": places,
            }
            branches[name] = {key: value.to(self.device) for key, value in inputs.items()}
        return Conditioning(branches)

    @torch.no_grad()
    def _embed(self, text: str) -> torch.Tensor:
        """The text encoder's states (tokens, width), on the CPU; one text at a time, see ModelScope."""
        self.onload(self.text_encoder)
        warn_truncated(self.tokenizer, text, self.text_tokens)
        tokens = self.tokens([text]).to(self.device)
        mask = tokens.attention_mask if self.masked_text else None
        states = self.text_encoder(tokens.input_ids, attention_mask=mask).last_hidden_state
        return states[0].to("cpu", self.dtype)

    def tokens(self, texts: list[str]) -> Any:
        """Ids and mask (B, tokens), filled up to the same length."""
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(texts, max_length=self.text_tokens, **options)

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
                f"take {more * time + 1} or {(more + 1) * time + 1}"
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
        """A schedule with more steps at high noise the larger and longer the clip is, as in diffusers."""
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
        clips = torch.stack([self.decode_clip(clip) for clip in latents])
        return clips if frames is None else clips[:, frames]

    def decode_clip(self, latents: torch.Tensor) -> torch.Tensor:
        """Frames (F, 3, H, W) in [0, 1] of one clip's latents (C, f, h, w)."""
        config: Any = self.vae.config
        mean, std = self.vae.latents_mean, self.vae.latents_std
        scaled = LTXPipeline._denormalize_latents(latents[None], mean, std, config.scaling_factor)
        timestep = None
        if config.timestep_conditioning:
            share = self.defaults["decode_noise_scale"]
            scaled = (1 - share) * scaled + share * decode_noise(scaled)
            timestep = scaled.new_tensor([self.defaults["decode_timestep"]], dtype=self.vae.dtype)
        pixels = self.vae.decode(scaled.to(self.vae.dtype), timestep).sample[0]
        return (pixels.transpose(0, 1) / 2 + 0.5).clamp(0, 1)

    def decode_vjp(self, latents, frames, gradient, decode_chunk_size=1) -> torch.Tensor:
        """As the base's; clip by clip, each decoded once and whole, whatever `decode_chunk_size` says."""
        self.onload(*self.decoders())
        pulled = []
        for clip, pixels in zip(latents.detach(), gradient):
            leaf = clip.requires_grad_()
            with torch.enable_grad():
                chosen = self.decode_clip(leaf)[frames]
            pulled += torch.autograd.grad(chosen, leaf, pixels)
        return torch.stack(pulled)


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
