"""HunyuanVideo (arXiv 2412.03603), text to video: diffusers' `HunyuanVideoPipeline` directories.

A rectified flow whose guidance is distilled into the network: it is told the scale, and a step is one call. Clips of more
than 4 latents are decoded in parts that overlap, and each part is looked at as a whole.
"""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import (
    AutoencoderKLHunyuanVideo,
    HunyuanVideoDecoder3D,
    HunyuanVideoResnetBlockCausal3D,
    HunyuanVideoUpBlock3D,
    HunyuanVideoUpsampleCausal3D,
)
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import (
    DEFAULT_PROMPT_TEMPLATE,
    HunyuanVideoPipeline,
)
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from torch.nn.functional import pad
from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer, LlamaModel

from ..offload import checkpointed
from .base import Conditioning, cached, warn_truncated
from .parts import ModelOfParts

# The published architecture, for `from_config`; what is missing here is the classes' own default.
LLAMA = {"vocab_size": 128320, "hidden_size": 4096, "intermediate_size": 14336}
LLAMA |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
CLIP = {"hidden_size": 768, "intermediate_size": 3072}
CLIP |= {"num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768}
PUBLISHED = {"transformer": {}, "vae": {}, "text_encoder": LLAMA, "text_encoder_2": CLIP}
PUBLISHED |= {"scheduler": {"shift": 7.0}}
DEFAULTS = {"num_inference_steps": 50, "guidance_scale": 6.0, "num_frames": 129, "fps": 24}
DEFAULTS |= {"height": 720, "width": 1280, "vae_tiling": False}
# One within the other: a part keeps its input, a block less than the layers that it is made of.
RECOMPUTED = HunyuanVideoDecoder3D, HunyuanVideoUpBlock3D
RECOMPUTED += HunyuanVideoResnetBlockCausal3D, HunyuanVideoUpsampleCausal3D
BLOCKS = {"HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"}
TEXT_LENGTH = 256  # tokens of a prompt that the transformer sees
CACHED_PROMPTS = 1000  # texts whose states a model keeps: 8 kB per token in half precision


class HunyuanVideo(ModelOfParts):
    """A `HunyuanVideoTransformer3DModel` with the text of LLaMA and CLIP, and a decoder that knows time.

    `guidance_scale` is told to the network. Classifier-free guidance with the negative prompt, in a second call, is
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
        # On the CPU; LLaMA's states are without padding, which the transformer does not see.
        self._embeddings: dict[str, torch.Tensor] = {}
        self._pooled: dict[str, torch.Tensor] = {}

    def decoders(self) -> list[nn.Module]:
        return [self.vae.post_quant_conv, self.vae.decoder]

    def blocks(self) -> list[nn.Module]:
        return [
            module
            for module in self.denoiser.modules()
            if BLOCKS & {cls.__name__ for cls in type(module).__mro__}
        ]

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
        """LLaMA's states of the texts, which of them are padding, CLIP's summary of each, and the guidance scale."""
        self.latent_shape(sampling)  # what cannot be made is an error before the encoders are at work
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
        """LLaMA's states (tokens, 4096) of a text within the template, on the CPU. One at a time, as ModelScope's."""
        self.onload(self.text_encoder)
        whole = DEFAULT_PROMPT_TEMPLATE["template"].format(text)
        limit = DEFAULT_PROMPT_TEMPLATE["crop_start"] + TEXT_LENGTH
        warn_truncated(self.tokenizer, whole, limit)
        embed: Any = HunyuanVideoPipeline._get_llama_prompt_embeds
        states, mask = embed(self, text, DEFAULT_PROMPT_TEMPLATE, device=self.device)
        return states[0, mask[0].bool()].to("cpu", self.dtype)

    @torch.no_grad()
    def _pool(self, text: str) -> torch.Tensor:
        """CLIP's summary (768,) of a text's first 77 tokens, on the CPU."""
        self.onload(self.text_encoder_2)
        embed: Any = HunyuanVideoPipeline._get_clip_prompt_embeds
        return embed(self, text, device=self.device)[0].to("cpu", self.dtype)

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
                f"take {more * time + 1} or {(more + 1) * time + 1}"
            )
        return config.in_channels, more + 1, sampling.height // space, sampling.width // space

    def new_scheduler(self, sampling):
        if not isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            raise ValueError(
                f"{self.name!r} is a rectified flow: {type(self.scheduler).__name__} cannot sample it, "
                "FlowMatchEulerDiscreteScheduler can"
            )
        scheduler: Any = deepcopy(self.scheduler)
        sigmas = np.linspace(1.0, 0.0, sampling.num_inference_steps + 1)[:-1]
        scheduler.set_timesteps(sigmas=sigmas, device=self.device)
        return scheduler

    def initial_latents(self, sampling, generators) -> torch.Tensor:
        """As the base's, never in half precision; nor are the steps, of which diffusers rounds each."""
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
        return torch.stack([self.decode_clip(clip, frames) for clip in latents])

    def decode_clip(self, latents: torch.Tensor, frames: list[int] | None) -> torch.Tensor:
        """Frames (F, 3, H, W) in [0, 1] of one clip's latents (C, f, h, w)."""
        part, places = self.needed(latents, frames)
        scaled = part[None].to(self.vae.dtype) / self.vae.config.scaling_factor
        pixels = self.vae.decode(scaled).sample[0].transpose(0, 1)
        return (pixels[places] / 2 + 0.5).clamp(0, 1)

    def needed(
        self, latents: torch.Tensor, frames: list[int] | None
    ) -> tuple[torch.Tensor, list[int]]:
        """The latents (C, f, h, w) that decode to these frames as the whole clip does, and the frames' places then.

        A frame is blended of the part of the clip that it is in and of the part before.
        """
        vae, count = self.vae, latents.shape[1]
        time = vae.temporal_compression_ratio
        every = range((count - 1) * time + 1)
        frames = list(every) if frames is None else [every[frame] for frame in frames]
        size, step = (
            n // time for n in (vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames)
        )
        if not vae.use_framewise_decoding or count <= size:
            return latents, frames
        parts = [max(frame - 1, 0) // (step * time) for frame in frames]
        start = max(min(parts) - 1, 0) * step
        needed = latents[:, start : max(parts) * step + size + 1]
        return needed, [frame - start * time for frame in frames]

    def decode_vjp(self, latents, frames, gradient, decode_chunk_size=1) -> torch.Tensor:
        """As the base's; clip by clip, whatever `decode_chunk_size` says, with one part's graph in memory at a time."""
        self.onload(*self.decoders())
        modules: list[nn.Module] = list(self.vae.decoder.modules())
        recomputed = [module for module in modules if isinstance(module, RECOMPUTED)]
        pulled = []
        for clip, pixels in zip(latents.detach(), gradient):
            leaf = clip.requires_grad_()
            with torch.enable_grad(), checkpointed(recomputed):
                chosen = self.decode_clip(leaf, frames)
                pulled += torch.autograd.grad(chosen, leaf, pixels)
        return torch.stack(pulled)
