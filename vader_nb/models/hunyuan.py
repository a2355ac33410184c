"""HunyuanVideo (arXiv 2412.03603), text to video: diffusers' `HunyuanVideoPipeline` directories.

A rectified flow whose guidance is distilled into the network: it is told the scale, and a step is one call. Long clips are
decoded in parts that overlap (`hunyuan_vae`).
"""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from torch.nn.functional import pad
from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer, LlamaModel

from . import hunyuan_vae
from .animatediff import PUBLISHED as STABLE_DIFFUSION
from .base import Conditioning, cached, instances, warn_truncated
from .parts import ModelOfParts

# The published architecture, for `from_config`; what is missing here is the classes' own default.
LLAMA = {"vocab_size": 128320, "hidden_size": 4096, "intermediate_size": 14336}
LLAMA |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
PUBLISHED = {"transformer": {}, "vae": {}, "text_encoder": LLAMA, "scheduler": {"shift": 7.0}}
PUBLISHED |= {"text_encoder_2": STABLE_DIFFUSION["text_encoder"]}
DEFAULTS = {"num_inference_steps": 50, "guidance_scale": 6.0, "num_frames": 129, "fps": 24}
DEFAULTS |= {"height": 720, "width": 1280, "vae_tiling": False}
BLOCKS = {"HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"}
TEMPLATE, CROP = DEFAULT_PROMPT_TEMPLATE["template"], DEFAULT_PROMPT_TEMPLATE["crop_start"]
TEXT_LENGTH = 256  # tokens of a prompt that the transformer sees
CACHED_PROMPTS = 1000  # texts whose states a model keeps: 8 kB per token in half precision


class HunyuanVideo(ModelOfParts):
    """A `HunyuanVideoTransformer3DModel` with LLaMA and CLIP as text encoders, and a temporal decoder.

    `guidance_scale` is an input of the network. Classifier-free guidance with the negative prompt, in a second call, is
    the option `true_cfg_scale`. `defaults["vae_tiling"]` is diffusers' `vae.enable_tiling()`: the decoder takes 256 x 256
    pixels at a time, in training and sampling alike. Without, its attention over 720 x 1280 needs tens of GiB.
    """

    family = "HunyuanVideoPipeline"
    # As published; the autoencoder's gradient is scaled to what float16 can hold.
    dtypes = {"default": torch.float16, "transformer": torch.bfloat16}
    targets = {"transformer": ("to_q", "to_k", "to_v", "to_out.0")}
    networks = {
        "transformer": HunyuanVideoTransformer3DModel,
        "vae": AutoencoderKLHunyuanVideo,
        "text_encoder": LlamaModel,
        "text_encoder_2": CLIPTextModel,
    }
    processors = {"tokenizer": AutoTokenizer, "tokenizer_2": CLIPTokenizer}
    published = PUBLISHED
    sampling_options = {"true_cfg_scale": 1.0}
    option_bounds = {"true_cfg_scale": (1, 1000)}
    independent_frames = False

    def __init__(self, name, transformer, vae, scheduler, defaults, world=None, **texts):
        self.name, self.world, self.vae, self.scheduler = name, world, vae, scheduler
        self.denoisers = {"transformer": transformer}
        self.text_encoder, self.tokenizer = texts["text_encoder"], texts["tokenizer"]
        self.text_encoder_2, self.tokenizer_2 = texts["text_encoder_2"], texts["tokenizer_2"]
        self.defaults = DEFAULTS | defaults
        if self.defaults["vae_tiling"]:
            vae.enable_tiling()
        # On the CPU. LLaMA's states are those of the text alone: the transformer does not see the padding.
        self._embeddings: dict[str, torch.Tensor] = {}
        self._pooled: dict[str, torch.Tensor] = {}

    def decoders(self) -> list[nn.Module]:
        return [self.vae.post_quant_conv, self.vae.decoder]

    def blocks(self) -> list[nn.Module]:
        return instances(self.denoiser, BLOCKS)

    def to(self, *args, **kwargs) -> "HunyuanVideo":
        super().to(*args, **kwargs)
        self._embeddings.clear()
        self._pooled.clear()
        return self

    # ------------------------------------------------------------------ the text and guidance

    def branches(self, sampling) -> list[str]:
        return ["prompt"] if sampling.options["true_cfg_scale"] == 1 else ["negative", "prompt"]

    def combine(self, outputs, t, sampling) -> torch.Tensor:
        scale = sampling.options["true_cfg_scale"]
        return super().combine(outputs, t, replace(sampling, guidance_scale=scale))

    def encode(self, prompts, sampling: Any = None, generators=None) -> Conditioning:
        """LLaMA's states of the texts, their padding mask, CLIP's pooled output, and the guidance scale."""
        self.latent_shape(sampling)  # raises for invalid sizes, before the encoders run
        columns, needed = self.texts(prompts), self.branches(sampling)
        both = [text for branch in needed for text in columns[branch]]
        known = cached(self._embeddings, both, self._embed, CACHED_PROMPTS)
        pooled = cached(self._pooled, both, self._pool, CACHED_PROMPTS)
        branches = {}
        for name in needed:
            rows = [known[text] for text in columns[name]]
            counts = torch.tensor([len(row) for row in rows])
            padded = [pad(row, (0, 0, 0, TEXT_LENGTH - len(row))) for row in rows]
            inputs = {
                "encoder_hidden_states": torch.stack(padded),
                "encoder_attention_mask": torch.arange(TEXT_LENGTH) < counts[:, None],
                "pooled_projections": torch.stack([pooled[text] for text in columns[name]]),
                "guidance": torch.full((len(rows),), sampling.guidance_scale).to(self.dtype) * 1000,
            }
            branches[name] = {key: value.to(self.device) for key, value in inputs.items()}
        return Conditioning(branches)

    @torch.no_grad()
    def _embed(self, text: str) -> torch.Tensor:
        """LLaMA's states (tokens, 4096) of a text within the template, on the CPU; without padding."""
        self.onload(self.text_encoder)
        warn_truncated(self.tokenizer, text, TEXT_LENGTH)
        text, limit = TEMPLATE.format(text), CROP + TEXT_LENGTH
        options = {"truncation": True, "return_tensors": "pt"}
        tokens = self.tokenizer(text, max_length=limit, **options).to(self.device)
        # Those before the last two layers, as in diffusers.
        states = self.text_encoder(tokens.input_ids, output_hidden_states=True).hidden_states[-3]
        return states[0, CROP:].to("cpu", self.dtype)

    @torch.no_grad()
    def _pool(self, text: str) -> torch.Tensor:
        """CLIP's summary (768,) of a text's first 77 tokens, on the CPU."""
        self.onload(self.text_encoder_2)
        options = {"truncation": True, "return_tensors": "pt"}
        tokens = self.tokenizer_2(text, max_length=77, **options).to(self.device)
        return self.text_encoder_2(tokens.input_ids).pooler_output[0].to("cpu", self.dtype)

    # ------------------------------------------------------------------ denoising

    def latent_shape(self, sampling) -> tuple[int, int, int, int]:
        denoiser: Any = self.denoiser
        config, time = denoiser.config, self.vae.temporal_compression_ratio
        space = self.vae.spatial_compression_ratio
        for name in ("height", "width"):
            value, step = getattr(sampling, name), space * config.patch_size
            if value < step or value % step:
                raise ValueError(
                    f"{name}={value} must be a positive multiple of {step} pixels for {self.name}"
                )
        more, rest = divmod(sampling.num_frames - 1, time)
        if rest:
            raise ValueError(
                f"num_frames={sampling.num_frames} must be 1 more than a multiple of {time} for {self.name}: "
                f"use {more * time + 1} or {(more + 1) * time + 1}"
            )
        return config.in_channels, more + 1, sampling.height // space, sampling.width // space

    def new_scheduler(self, sampling):
        if type(self.scheduler).__name__ != "FlowMatchEulerDiscreteScheduler":
            raise ValueError(
                f"{self.name!r} is a rectified flow: {type(self.scheduler).__name__} cannot sample it, "
                "FlowMatchEulerDiscreteScheduler can"
            )
        scheduler: Any = deepcopy(self.scheduler)
        sigmas = np.linspace(1.0, 0.0, sampling.num_inference_steps + 1)[:-1]
        scheduler.set_timesteps(sigmas=sigmas, device=self.device)
        return scheduler

    def initial_latents(self, sampling, generators) -> torch.Tensor:
        """As the base's, but never in half precision; nor are the steps, each of which diffusers rounds."""
        wide = torch.promote_types(self.dtype, torch.float32)
        shape = (len(generators), *self.latent_shape(sampling))
        return randn_tensor(shape, generator=generators, device=self.device, dtype=wide)

    def predict(self, latents, t, inputs) -> torch.Tensor:
        self.onload(self.denoiser)
        times = t.expand(len(latents))
        output = self.denoiser(latents.to(self.dtype), times, **inputs, return_dict=False)[0]
        return output.to(torch.promote_types(self.dtype, torch.float32))

    # ------------------------------------------------------------------ decoding

    def decode(self, latents: torch.Tensor, frames: list[int] | None = None) -> torch.Tensor:
        self.onload(*self.decoders())
        return torch.stack([hunyuan_vae.decode(self.vae, clip, frames) for clip in latents])

    def decode_vjp(self, latents, frames, gradient, decode_chunk_size=1) -> torch.Tensor:
        """As the base's; clip by clip, part by part, whatever `decode_chunk_size` says."""
        self.onload(*self.decoders())
        pairs = zip(latents, gradient)
        return torch.stack([hunyuan_vae.decode_vjp(self.vae, z, frames, g) for z, g in pairs])
