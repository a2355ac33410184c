"""CogVideoX-2b, 5b and 1.5 (arXiv 2408.06072), text to video: diffusers' `CogVideoXPipeline` directories.

The decoder is causal and takes a clip in chunks of two latents, so the gradient of any reward is swept
back through it chunk by chunk, exactly, and the first frames are decoded from the first chunks alone.
"""

from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import (
    AutoencoderKLCogVideoX,
    CogVideoXResnetBlock3D,
    CogVideoXSpatialNorm3D,
    CogVideoXUpBlock3D,
)
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from diffusers.pipelines.cogvideo.pipeline_cogvideox import CogVideoXPipeline
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from transformers import AutoTokenizer, T5EncoderModel

from ..offload import checkpointed
from . import causal
from .base import Conditioning, cached, read_config, warn_truncated
from .causal_decoder import CausalDecoder
from .parts import ModelOfParts
from .texts import TextOnDisk

# The published architectures, for `from_config`; what is missing here is the classes' own default.
SCHEDULER = {"clip_sample": False, "prediction_type": "v_prediction"}
SCHEDULER |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
T5_XXL = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
T5_XXL |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
PUBLISHED = {"transformer": {}, "vae": {}, "text_encoder": T5_XXL, "scheduler": SCHEDULER}
ROTARY = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
LARGE = {"transformer": ROTARY, "vae": {"scaling_factor": 0.7}}
LARGE |= {"scheduler": SCHEDULER | {"snr_shift_scale": 1.0}}
LONG = {"patch_size_t": 2, "patch_bias": False, "sample_frames": 81}
LONG |= {"sample_height": 300, "sample_width": 300}
SIZES = {  # hub id -> what differs from 2b
    "THUDM/CogVideoX-5b": LARGE,
    "THUDM/CogVideoX1.5-5B": LARGE | {"transformer": ROTARY | LONG},
}
DEFAULTS = {"num_inference_steps": 50, "guidance_scale": 6.0, "fps": 8}
# One within the other: blocks keep less than the layers that they are made of, and norms are cheap.
RECOMPUTED = CogVideoXUpBlock3D, CogVideoXResnetBlock3D, CogVideoXSpatialNorm3D
SIDES = "height", "width"
CACHED_PROMPTS = 500  # prompts whose embeddings a model keeps: 1.9 MB each in half precision


class CogVideoX(CausalDecoder, TextOnDisk, ModelOfParts):
    """A `CogVideoXTransformer3DModel` with T5's text encoder and a causal autoencoder.

    Clips have 8 k + 1 frames, or 8 k where the network (not 1.5's) takes latents one by one: an even number
    of latents is decoded to four frames each, and the first one of an odd number to one.
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
        self.text_encoder, self.tokenizer, self.scheduler = text_encoder, tokenizer, scheduler
        self.scale = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels per latent, 8
        config = transformer.config
        own = {"num_frames": config.sample_frames}
        own |= {n: self.scale * config[f"sample_{n}"] for n in SIDES}
        if config.patch_size_t:  # 1.5's configuration names the largest size instead
            own |= {"height": min(768, own["height"]), "width": min(1360, own["width"]), "fps": 16}
        self.defaults = DEFAULTS | own | defaults
        self.set_decoder(self.defaults)
        self._embeddings: dict[str, torch.Tensor] = {}  # on the CPU
        for module in vae.decoder.modules():
            if isinstance(module, CogVideoXSpatialNorm3D):
                module.register_forward_hook(without_cache)

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
        columns = self.texts(prompts)
        if sampling is not None:
            self.latent_shape(sampling)  # what cannot be made is an error before T5 is at work
        self.encode_texts(prompts)
        both = columns["prompt"] + columns["negative"]
        known = cached(self._embeddings, both, self._embed, CACHED_PROMPTS)
        states = {
            branch: torch.stack([known[text] for text in column]).to(self.device)
            for branch, column in columns.items()
        }
        return Conditioning({branch: {"encoder_hidden_states": x} for branch, x in states.items()})

    @torch.no_grad()
    def _embed(self, text: str) -> torch.Tensor:
        """The text encoder's states (tokens, width), on the CPU. One text at a time, as ModelScope's."""
        self.onload(self.text_encoder)
        length = self.config.max_text_seq_length
        warn_truncated(self.tokenizer, text, length)
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        tokens = self.tokenizer(text, max_length=length, **options).input_ids
        states = self.text_encoder(tokens.to(self.device)).last_hidden_state[0]
        return states.to("cpu", self.dtype)

    # ------------------------------------------------------------------ denoising

    @property
    def config(self) -> Any:
        """The denoiser's."""
        denoiser: Any = self.denoiser
        return denoiser.config

    def frames_of(self, latents: int) -> int:
        """The number of frames that so many latents are decoded to: a last one for itself, and fours."""
        return latents // 2 * 2 * self.vae.config.temporal_compression_ratio + latents % 2

    def latents_of(self, frames: int) -> int | None:
        """The number of latents of a clip of so many frames; None where there is none such."""
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
        """As the base's. Raises ValueError for a scheduler whose step is another, and a noise without effect."""
        name = type(self.scheduler).__name__
        if name == "CogVideoXDPMScheduler":
            raise ValueError(f"{name} cannot be replayed: take CogVideoXDDIMScheduler.from_config")
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

    def chunks(
        self, latents: torch.Tensor, frames: list[int] | None
    ) -> tuple[list[torch.Tensor], list[int], list[int]]:
        """The decoder's chunks up to the last of these frames: their latents, how many frames each makes, and
        the frames' indices."""
        self.onload(*self.decoders())
        if self.config.patch_size_t:  # an odd number of latents, filled up in front
            latents = latents[:, :, 1:]
        count = latents.shape[2]
        pairs = [2] * (count // 2) or [0]
        pairs[0] += count % 2  # the first chunk has three, or one
        makes = [self.frames_of(n) for n in pairs]
        every = range(sum(makes))
        frames = list(every) if frames is None else [every[frame] for frame in frames]
        needed = next(n for n in range(len(makes) + 1) if sum(makes[:n]) > max(frames))
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        return list(scaled.split(pairs, dim=2))[:needed], makes[:needed], frames

    def decode_chunk(self, latents: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        """Frames (B, f, 3, H, W) in [0, 1] of a chunk (B, C, 1 to 3, h, w), after the state that the chunk
        before left."""
        pixels, state = self.vae.decoder(latents, conv_cache=state)
        return (pixels / 2 + 0.5).clamp(0, 1).transpose(1, 2), state

    def decode(self, latents: torch.Tensor, frames: list[int] | None = None) -> torch.Tensor:
        parts, makes, frames = self.chunks(latents, frames)
        return causal.decode(self.decode_chunk, parts, None, makes, frames)

    def decode_vjp(self, latents, frames, gradient, decode_chunk_size=1) -> torch.Tensor:
        """As the base's, swept back in time; the decoder's own chunks bound the memory. See `CausalDecoder`."""
        leaf = latents.detach().requires_grad_()
        with torch.enable_grad():
            parts, makes, frames = self.chunks(leaf, frames)
        recomputed: list[nn.Module] = [
            part for part in self.vae.decoder.modules() if isinstance(part, RECOMPUTED)
        ]
        sweep = self.decode_chunk, [part.detach() for part in parts], None, makes, frames
        with checkpointed(recomputed):
            pulled = causal.decode_vjp(*sweep, gradient, self.new_states())
        (found,) = torch.autograd.grad(parts, leaf, pulled)
        return found


def without_cache(norm: nn.Module, inputs: Any, output: Any) -> tuple[torch.Tensor, dict]:
    """A hook: the cache of a norm's convolutions, which look at one frame each, is never read, and large."""
    return output[0], {}
