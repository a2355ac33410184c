"""ModelScope text-to-video (arXiv 2308.06571), its fine-tune ZeroScope, and the embedded `tiny` model.

All three are diffusers `TextToVideoSDPipeline` directories. The pipeline class itself is deprecated in
diffusers and samples without a gradient, so the parts are loaded one by one and the loop is ours
(`vader_nb.gradient`).
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import BatchEncoding, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .base import Conditioning, VideoModel

# The published architecture, for `outline`; what is not said here is the classes' own default.
PUBLISHED = {
    "unet": {"cross_attention_dim": 1024, "attention_head_dim": 64, "sample_size": 32},
    "vae": {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
    },
    "text_encoder": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
    "scheduler": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
    },
}
REMEMBERED = 1000  # prompts whose embeddings a model keeps: 160 kB each for ModelScope


class ModelScope(VideoModel):
    prefix = "unet"
    targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, name, denoiser, vae, text_encoder, tokenizer, scheduler, defaults):
        self.name, self.denoiser, self.vae = name, denoiser, vae
        self.text_encoder, self.tokenizer, self.scheduler = text_encoder, tokenizer, scheduler
        self.scale = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels a latent, 8
        size = denoiser.config.sample_size * self.scale
        self.defaults = {"height": size, "width": size} | defaults
        self.texts: dict[str, torch.Tensor] = {}  # what `encode` has computed, on the CPU
        for module in self.modules():
            # Eval mode for good: the temporal convolutions hold a dropout of 0.1. Frozen for good: only the
            # adapter, added later, asks for gradients.
            module.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, name: str, scheduler, defaults: dict, dtype: torch.dtype, **hub
    ):
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

    @classmethod
    def outline(cls, folder: Path | None, *, name: str, scheduler, defaults: dict) -> "ModelScope":
        """The architecture alone, of a pipeline directory or, without one, as published: no weights are read, and what
        is made has torch's default dtype. For fake tensors (`vader_nb.memory`), which have sizes but no numbers."""
        config = {part: read_config(folder / part) for part in PUBLISHED} if folder else PUBLISHED
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer") if folder else Tokens()
        with unset_fake_temporarily():  # its tables are read, not only their sizes
            scheduler = scheduler.from_config(config["scheduler"])
        return cls(
            name,
            UNet3DConditionModel.from_config(config["unet"]),
            AutoencoderKL.from_config(config["vae"]),
            CLIPTextModel(CLIPTextConfig(**config["text_encoder"])),
            tokenizer,
            scheduler,
            defaults,
        )

    def modules(self) -> list[nn.Module]:
        return [self.denoiser, self.vae, self.text_encoder]

    def decoders(self) -> list[nn.Module]:
        return [self.vae.post_quant_conv, self.vae.decoder]

    def to(self, *args, **kwargs) -> "ModelScope":
        if self.turns is not None:
            raise RuntimeError(
                f"{self.name!r} offloads its networks already; move or convert it before that"
            )
        for module in self.modules():
            module.to(*args, **kwargs)
        self.texts.clear()
        return self

    def encode(self, prompts: list[str]) -> Conditioning:
        prompts = [*prompts, ""]
        if len(self.texts) + len(prompts) > REMEMBERED:
            self.texts.clear()
        for prompt in dict.fromkeys(prompts):
            if prompt not in self.texts:
                self.texts[prompt] = self.read(prompt)
        embedding = torch.stack([self.texts[prompt] for prompt in prompts]).to(self.device)
        return Conditioning(embedding[:-1], embedding[-1:].expand(len(embedding) - 1, -1, -1))

    @torch.no_grad()
    def read(self, prompt: str) -> torch.Tensor:
        """The text encoder's states (tokens, width), on the CPU. A prompt by itself: its numbers should not depend, not
        even in the last bit, on those beside which it was met first."""
        self.bring(self.text_encoder)
        tokens = self.tokenizer(
            prompt,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return (
            self.text_encoder(tokens.input_ids.to(self.device))
            .last_hidden_state[0]
            .to("cpu", self.dtype)
        )

    def initial_latents(
        self, num_frames: int, height: int, width: int, generators: list
    ) -> torch.Tensor:
        for name, value in {"height": height, "width": width}.items():
            if value < self.scale or value % self.scale:
                raise ValueError(
                    f"{name}={value} must be a positive multiple of {self.scale} pixels for {self.name}"
                )
        if num_frames < 1:
            raise ValueError(f"num_frames={num_frames} must be at least 1")
        channels = self.denoiser.config.in_channels
        shape = (len(generators), channels, num_frames, height // self.scale, width // self.scale)
        return randn_tensor(shape, generator=generators, device=self.device, dtype=self.dtype)

    def predict(self, latents, t, conditioning, guidance_scale, sequential=False) -> torch.Tensor:
        self.bring(self.denoiser)
        if guidance_scale == 1:
            return self.denoiser(latents, t, conditioning.prompt).sample
        if sequential:
            empty, prompt = (
                self.denoiser(latents, t, text).sample
                for text in (conditioning.empty, conditioning.prompt)
            )
        else:
            text = torch.cat([conditioning.empty, conditioning.prompt])
            empty, prompt = self.denoiser(torch.cat([latents] * 2), t, text).sample.chunk(2)
        return empty + guidance_scale * (prompt - empty)

    def decode(self, latents: torch.Tensor, frames: list[int]) -> torch.Tensor:
        self.bring(*self.decoders())
        # The autoencoder knows no time, so any frame on its own is exact.
        chosen = latents[:, :, frames].transpose(1, 2)  # (B, f, C, H, W)
        pixels = self.vae.decode(chosen.flatten(0, 1) / self.vae.config.scaling_factor).sample
        return (pixels / 2 + 0.5).clamp(0, 1).unflatten(0, chosen.shape[:2])

    def blocks(self) -> list[nn.Module]:
        wrapped = {
            "ResnetBlock2D",
            "TemporalConvLayer",
            "Transformer2DModel",
            "TransformerTemporalModel",
        }
        # By the names of all its classes: an engine (FSDP) or a compiler makes a class of its own of a block's.
        return [
            m
            for m in self.denoiser.modules()
            if wrapped & {kind.__name__ for kind in type(m).__mro__}
        ]


class Tokens:
    """In place of a tokenizer whose vocabulary is not at hand: as many tokens, all of them 0."""

    model_max_length = 77

    def __call__(self, prompt: str, **options) -> BatchEncoding:
        return BatchEncoding({"input_ids": torch.zeros(1, self.model_max_length, dtype=torch.long)})


def read_config(folder: Path) -> dict:
    file = next(
        file
        for file in (folder / "config.json", folder / "scheduler_config.json")
        if file.is_file()
    )
    return json.loads(file.read_text())


def without(mapping: dict, key: str) -> dict:
    return {name: value for name, value in mapping.items() if name != key}
