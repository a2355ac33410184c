"""ModelScope text-to-video (arXiv 2308.06571), its fine-tune ZeroScope, and the embedded `tiny` model.

All three are diffusers `TextToVideoSDPipeline` directories. The pipeline class itself is deprecated in
diffusers and samples without a gradient, so the parts are loaded one by one and the loop is ours
(`vader_nb.gradient`).
"""

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_3d_condition import UNet3DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from .base import Conditioning, cached, warn_truncated
from .parts import ModelOfParts

# The published architecture, for `from_config`; what is missing here is the classes' own default.
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
CACHED_PROMPTS = 1000  # prompts whose embeddings a model keeps: 160 kB each for ModelScope
DEFAULTS = {"num_inference_steps": 25, "guidance_scale": 9.0, "num_frames": 16, "fps": 8}


class TextOncePerClip(AttnProcessor2_0):
    """Attention whose keys and values of the text are computed once per clip.

    `UNet3DConditionModel` repeats the text for each frame. Here all frames of a clip are queries to one text,
    which gives the same attention.
    """

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, *args, num_frames=1, **kwargs
    ):
        if encoder_hidden_states is None or num_frames == 1:
            return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        clips = hidden_states.unflatten(0, (-1, num_frames)).flatten(1, 2)
        text = encoder_hidden_states[::num_frames]
        out = super().__call__(attn, clips, text, *args, **kwargs)
        return out.unflatten(1, (num_frames, -1)).flatten(0, 1)


class ModelScope(ModelOfParts):
    """A `UNet3DConditionModel` with CLIP's text encoder and a 2D autoencoder, which decodes frame by frame."""

    family = "TextToVideoSDPipeline"
    targets = {"unet": ("to_q", "to_k", "to_v", "to_out.0")}
    networks = {"unet": UNet3DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    processors = {"tokenizer": CLIPTokenizer}
    published = PUBLISHED
    own_defaults: dict = DEFAULTS

    def __init__(self, name, unet, vae, text_encoder, tokenizer, scheduler, defaults, world=None):
        self.name, self.world, self.vae = name, world, vae
        self.denoisers = {"unet": unet}
        self.text_encoder, self.tokenizer, self.scheduler = text_encoder, tokenizer, scheduler
        self.scale = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels per latent, 8
        unet.set_attn_processor(TextOncePerClip())
        size = unet.config.sample_size * self.scale
        self.defaults = {"height": size, "width": size} | self.own_defaults | defaults
        self._embeddings: dict[str, torch.Tensor] = {}  # on the CPU

    def decoders(self) -> list[nn.Module]:
        return [self.vae.post_quant_conv, self.vae.decoder]

    def to(self, *args, **kwargs) -> "ModelScope":
        super().to(*args, **kwargs)
        self._embeddings.clear()
        return self

    def encode(self, prompts, sampling=None, generators=None) -> Conditioning:
        texts = self.texts(prompts)
        both = texts["prompt"] + texts["negative"]
        known = cached(self._embeddings, both, self._embed, CACHED_PROMPTS)
        states = {
            branch: torch.stack([known[text] for text in column]).to(self.device)
            for branch, column in texts.items()
        }
        return Conditioning({branch: {"encoder_hidden_states": x} for branch, x in states.items()})

    @torch.no_grad()
    def _embed(self, text: str) -> torch.Tensor:
        """The text encoder's states (tokens, width), on the CPU.

        One text at a time: the result must not depend, even in the last bit, on which other texts it
        was first encoded with.
        """
        self.onload(self.text_encoder)
        warn_truncated(self.tokenizer, text)
        tokens = self.tokens(text).to(self.device)
        return self.text_encoder(tokens).last_hidden_state[0].to("cpu", self.dtype)

    def tokens(self, text: str) -> torch.Tensor:
        """The ids (1, tokens) of a text, filled up to the tokenizer's length."""
        length = self.tokenizer.model_max_length
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(text, max_length=length, **options).input_ids

    def latent_shape(self, sampling) -> tuple[int, int, int, int]:
        for name in ("height", "width"):
            value = getattr(sampling, name)
            if value < self.scale or value % self.scale:
                raise ValueError(
                    f"{name}={value} must be a positive multiple of {self.scale} pixels for {self.name}"
                )
        if sampling.num_frames < 1:
            raise ValueError(f"num_frames={sampling.num_frames} must be at least 1")
        channels = int(self.denoiser.get_parameter("conv_in.weight").shape[1])
        height, width = sampling.height // self.scale, sampling.width // self.scale
        return channels, sampling.num_frames, height, width

    def predict(self, latents, t, inputs) -> torch.Tensor:
        self.onload(self.denoiser)
        frames = {"num_frames": latents.shape[2]}
        text = inputs["encoder_hidden_states"]
        condition = inputs.get("timestep_cond")
        return self.denoiser(
            latents, t, text, timestep_cond=condition, cross_attention_kwargs=frames
        ).sample

    def decode(self, latents: torch.Tensor, frames: list[int] | None = None) -> torch.Tensor:
        if frames is None:
            return torch.cat([self.decode(latents, [i]) for i in range(latents.shape[2])], dim=1)
        self.onload(*self.decoders())
        # The autoencoder has no temporal layers, so any frame on its own is exact.
        chosen = latents[:, :, frames].transpose(1, 2)  # (B, f, C, H, W)
        scaled = chosen.flatten(0, 1) / self.vae.config.scaling_factor
        pixels = self.vae.decode(scaled.to(self.vae.dtype)).sample
        return (pixels / 2 + 0.5).clamp(0, 1).unflatten(0, chosen.shape[:2])

    def blocks(self) -> list[nn.Module]:
        wrapped = {
            "ResnetBlock2D",
            "TemporalConvLayer",
            "Transformer2DModel",
            "TransformerTemporalModel",
        }
        # By the names of all its classes, since an engine (FSDP) or a compiler derives its own class from a block's.
        return [
            module
            for module in self.denoiser.modules()
            if wrapped & {cls.__name__ for cls in type(module).__mro__}
        ]
