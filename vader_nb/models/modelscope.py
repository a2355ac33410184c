"""ModelScope text-to-video (arXiv 2308.06571), its fine-tune ZeroScope, and the embedded `tiny` model.

All three are diffusers `TextToVideoSDPipeline` directories. The pipeline class itself is deprecated in
diffusers and samples without a gradient, so the parts are loaded one by one and the loop is ours
(`vader_nb.gradient`).
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from .base import Conditioning, VideoModel


class ModelScope(VideoModel):
    prefix = "unet"
    targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, name, denoiser, vae, text_encoder, tokenizer, scheduler, defaults):
        self.name, self.denoiser, self.vae = name, denoiser, vae
        self.text_encoder, self.tokenizer, self.scheduler = text_encoder, tokenizer, scheduler
        self.scale = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels a latent, 8
        size = denoiser.config.sample_size * self.scale
        self.defaults = {"height": size, "width": size} | defaults
        for module in self.modules():
            # Eval mode for good: the temporal convolutions hold a dropout of 0.1. Frozen for good: only the
            # adapter, added later, asks for gradients.
            module.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, name: str, scheduler, defaults: dict, dtype: torch.dtype, **hub):
        """Load the parts of a pipeline directory or hub repository. `hub`: revision, variant, cache_dir, …"""
        return cls(
            name,
            UNet3DConditionModel.from_pretrained(path, subfolder="unet", torch_dtype=dtype, **hub),
            AutoencoderKL.from_pretrained(path, subfolder="vae", torch_dtype=dtype, **hub),
            CLIPTextModel.from_pretrained(path, subfolder="text_encoder", dtype=dtype, **hub),
            CLIPTokenizer.from_pretrained(path, subfolder="tokenizer", **without(hub, "variant")),
            scheduler.from_pretrained(path, subfolder="scheduler", **without(hub, "variant")),
            defaults,
        )

    def modules(self) -> list[nn.Module]:
        return [self.denoiser, self.vae, self.text_encoder]

    def to(self, *args, **kwargs) -> "ModelScope":
        for module in self.modules():
            module.to(*args, **kwargs)
        return self

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        tokens = self.tokenizer(
            [*prompts, ""],
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        embedding = self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state.to(self.dtype)
        return Conditioning(embedding[:-1], embedding[-1:].expand(len(prompts), -1, -1))

    def initial_latents(self, num_frames: int, height: int, width: int, generators: list) -> torch.Tensor:
        for name, value in {"height": height, "width": width}.items():
            if value < self.scale or value % self.scale:
                raise ValueError(f"{name}={value} must be a positive multiple of {self.scale} pixels for {self.name}")
        if num_frames < 1:
            raise ValueError(f"num_frames={num_frames} must be at least 1")
        channels = self.denoiser.config.in_channels
        shape = (len(generators), channels, num_frames, height // self.scale, width // self.scale)
        return randn_tensor(shape, generator=generators, device=self.device, dtype=self.dtype)

    def predict(self, latents, t, conditioning, guidance_scale, unconditional_gradient=True) -> torch.Tensor:
        if guidance_scale == 1:
            return self.denoiser(latents, t, conditioning.prompt).sample
        if unconditional_gradient:
            text = torch.cat([conditioning.empty, conditioning.prompt])
            empty, prompt = self.denoiser(torch.cat([latents] * 2), t, text).sample.chunk(2)
        else:
            with torch.no_grad():
                empty = self.denoiser(latents, t, conditioning.empty).sample
            prompt = self.denoiser(latents, t, conditioning.prompt).sample
        return empty + guidance_scale * (prompt - empty)

    def decode(self, latents: torch.Tensor, frames: list[int]) -> torch.Tensor:
        # The autoencoder knows no time, so any frame on its own is exact.
        chosen = latents[:, :, frames].transpose(1, 2)  # (B, f, C, H, W)
        pixels = self.vae.decode(chosen.flatten(0, 1) / self.vae.config.scaling_factor).sample
        return (pixels / 2 + 0.5).clamp(0, 1).unflatten(0, chosen.shape[:2])

    def blocks(self) -> list[nn.Module]:
        wrapped = {"ResnetBlock2D", "TemporalConvLayer", "Transformer2DModel", "TransformerTemporalModel"}
        return [module for module in self.denoiser.modules() if type(module).__name__ in wrapped]


def without(mapping: dict, key: str) -> dict:
    return {name: value for name, value in mapping.items() if name != key}
