"""CogVideoX-2b, 5b and 1.5 (arXiv 2408.06072), text to video: diffusers' `CogVideoXPipeline` directories.

The decoder is causal, so the gradient of any reward is swept back through it chunk by chunk, exactly, and the first
frames are decoded from the first chunks alone (`cogvideox_vae`).
"""

from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from diffusers.pipelines.cogvideo.pipeline_cogvideox import CogVideoXPipeline
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from torch.nn.functional import pad
from transformers import AutoTokenizer, T5EncoderModel

from . import cogvideox_vae
from .base import Conditioning, read_config
from .causal_decoder import CausalDecoder
from .cogvideox_configs import PUBLISHED, SIZES
from .t5 import TextByT5

DEFAULTS = {"num_inference_steps": 50, "guidance_scale": 6.0, "fps": 8}
SIDES = "height", "width"


class CogVideoX(CausalDecoder, TextByT5):
    """A `CogVideoXTransformer3DModel` with T5's text encoder and a causal autoencoder.

    Clips have 8 k + 1 frames, or 8 k where the network (not 1.5's) takes latents one by one: latents
    are decoded to four frames each, except that the first of an odd number is decoded to one.
    """

    family = "CogVideoXPipeline"
    targets = {"transformer": ("to_q", "to_k", "to_v", "to_out.0")}
    lora_formats = ("diffusers", "peft")  # ComfyUI's nodes for CogVideoX read diffusers' files
    networks = {
        "transformer": CogVideoXTransformer3DModel,
        "vae": AutoencoderKLCogVideoX,
        "text_encoder": T5EncoderModel,
    }
    processors = {"tokenizer": AutoTokenizer}
    # The DPM scheduler's step takes what earlier steps predicted, which no other scheduler's does; the
    # configuration of both is the same.
    schedulers = {"CogVideoXDPMScheduler": CogVideoXDDIMScheduler}
    published = PUBLISHED
    independent_frames = False

    def __init__(
        self, name, transformer, vae, text_encoder, tokenizer, scheduler, defaults, world=None
    ):
        self.name, self.world, self.vae = name, world, vae
        self.denoisers = {"transformer": transformer}
        self.scheduler = scheduler
        self.scale = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels per latent, 8
        config = transformer.config
        self.set_text_encoder(text_encoder, tokenizer, config.max_text_seq_length)
        own = {"num_frames": config.sample_frames}
        own |= {n: self.scale * config[f"sample_{n}"] for n in SIDES}
        if config.patch_size_t:  # 1.5's configuration names the largest size instead
            own |= {"height": min(768, own["height"]), "width": min(1360, own["width"]), "fps": 16}
        self.defaults = DEFAULTS | own | defaults
        self.set_decoder(self.defaults)
        cogvideox_vae.forget_unread(vae)

    @classmethod
    def published_for(cls, checkpoint) -> dict[str, dict]:
        return PUBLISHED | SIZES.get(checkpoint.source, {})

    @classmethod
    def dtypes_of(cls, checkpoint) -> dict[str, torch.dtype]:
        """2b was made for float16; 5b and 1.5, which have rotary positions, for bfloat16."""
        if folder := checkpoint.directory:
            config = read_config(folder / "transformer")
        else:
            config = cls.published_for(checkpoint)["transformer"]
        rotary = config.get("use_rotary_positional_embeddings")
        return {"default": torch.bfloat16 if rotary else torch.float16}

    def decoders(self) -> list[nn.Module]:
        return [self.vae.decoder]

    def blocks(self) -> list[nn.Module]:
        return list(self.denoiser.get_submodule("transformer_blocks").children())

    # ------------------------------------------------------------------ the text

    def encode(self, prompts, sampling=None, generators=None) -> Conditioning:
        """T5's states of the texts, (B, 226, 4096); the network is given those of the padding, too."""
        if sampling is not None:
            self.latent_shape(sampling)  # raises for invalid sizes, before T5 runs
        states = self.text_states(prompts).items()
        return Conditioning(
            {branch: {"encoder_hidden_states": x.to(self.device)} for branch, x in states}
        )

    # ------------------------------------------------------------------ denoising

    @property
    def config(self) -> Any:
        """The denoiser's."""
        denoiser: Any = self.denoiser
        return denoiser.config

    def frames_of(self, latents: int) -> int:
        """The number of frames that so many latents are decoded to."""
        return cogvideox_vae.frames_of(self.vae, latents)

    def latents_of(self, frames: int) -> int | None:
        """The number of latents of a clip of this many frames; None if there is no such clip."""
        count = (frames - 1) // self.vae.config.temporal_compression_ratio + 1
        odd = count % 2 or not self.config.patch_size_t  # what `chunks` takes for granted
        return count if odd and self.frames_of(count) == frames else None

    def latent_shape(self, sampling) -> tuple[int, int, int, int]:
        unit, grid = self.scale * self.config.patch_size, self.config.patch_size_t
        for name in SIDES:
            value, most = getattr(sampling, name), self.config[f"sample_{name}"] * self.scale
            if value < unit or value % unit or (grid and value > most):
                limit = f" up to {most}" if grid else ""
                raise ValueError(
                    f"{name}={value} must be a positive multiple of {unit} pixels{limit} for {self.name}"
                )
        frames, step = sampling.num_frames, self.frames_of(2)
        count = self.latents_of(frames)
        if count is None:
            near = [n for n in range(max(1, frames - step), frames + step) if self.latents_of(n)]
            below, above = max(n for n in near if n < frames), min(n for n in near if n > frames)
            raise ValueError(
                f"num_frames={frames} cannot be decoded by {self.name}: the nearest are {below} and {above}"
            )
        count += -count % (grid or 1)
        return self.config.in_channels, count, *(getattr(sampling, n) // self.scale for n in SIDES)

    def new_scheduler(self, sampling):
        """As the base's. Raises ValueError for a scheduler with a different step, and for an eta without effect."""
        name = type(self.scheduler).__name__
        if name == "CogVideoXDPMScheduler":
            raise ValueError(f"{name} cannot be replayed: use CogVideoXDDIMScheduler.from_config")
        if sampling.eta and name == "CogVideoXDDIMScheduler":
            raise ValueError(f"eta={sampling.eta} has no effect with {name}: set it to 0")
        return super().new_scheduler(sampling)

    def initial_latents(self, sampling, generators) -> torch.Tensor:
        channels, frames, *size = self.latent_shape(sampling)
        shape = (len(generators), frames, channels, *size)  # drawn as diffusers does
        noise = randn_tensor(shape, generator=generators, device=self.device, dtype=self.dtype)
        return noise.transpose(1, 2).contiguous()

    def predict(self, latents, t, inputs) -> torch.Tensor:
        self.onload(self.denoiser)
        output = self.denoiser(
            latents.transpose(1, 2),
            inputs["encoder_hidden_states"],
            t.expand(len(latents)),
            image_rotary_emb=self.positions(latents),
            return_dict=False,
        )[0].transpose(1, 2)
        return output.to(torch.promote_types(output.dtype, torch.float32))  # for guidance and step

    def positions(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosines and sines of the rotary embeddings, (tokens, 64) each; None for 2b, which has none."""
        if not self.config.use_rotary_positional_embeddings:
            return None
        frames, *size = latents.shape[2:]
        parts = SimpleNamespace(vae_scale_factor_spatial=self.scale, transformer=self.denoiser)
        made: Any = CogVideoXPipeline._prepare_rotary_positional_embeddings
        return made(parts, *(n * self.scale for n in size), frames, latents.device)

    def step(self, scheduler, output, t, latents, **options) -> torch.Tensor:
        return super().step(scheduler, output, t, latents, **options).to(latents.dtype)

    # ------------------------------------------------------------------ decoding

    def decode(self, latents: torch.Tensor, frames: list[int] | None = None) -> torch.Tensor:
        return cogvideox_vae.decode(self.vae, self.for_decoder(latents), frames)

    def decode_vjp(self, latents, frames, gradient, decode_chunk_size=1) -> torch.Tensor:
        """As the base's, swept back in time; the decoder's own chunks bound the memory. See `CausalDecoder`."""
        own = self.for_decoder(latents)
        pulled = cogvideox_vae.decode_vjp(self.vae, own, frames, gradient, self.new_states())
        return pad(pulled, (0, 0, 0, 0, latents.shape[2] - own.shape[2], 0))

    def for_decoder(self, latents: torch.Tensor) -> torch.Tensor:
        """The latents that are decoded. 1.5's, an odd number, are filled up in front for the denoiser."""
        self.onload(*self.decoders())
        return latents[:, :, 1:] if self.config.patch_size_t else latents
