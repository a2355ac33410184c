"""Wan 2.1 (arXiv 2503.20314) and Wan 2.2 (github.com/Wan-Video/Wan2.2), text to video, and with 2.2 5B image to video.

All are diffusers `WanPipeline` directories: a rectified flow in a transformer, or in two, of which one is for high noise
and one for low noise. The decoder is causal: a latent gives 4 frames, the first one a single frame, and each reaches
all later frames. Its gradient is streamed (`wan_vae`).
"""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from transformers import AutoTokenizer, UMT5EncoderModel

from . import wan_vae
from .base import is_flow
from .causal_decoder import CausalDecoder
from .wan_configs import PUBLISHED, original_names
from .wan_image import FromFirstFrame, with_first

DEFAULTS = {"num_inference_steps": 50, "guidance_scale": 5.0, "num_frames": 81, "fps": 16}
DEFAULTS |= {"height": 480, "width": 832}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class Wan(CausalDecoder, FromFirstFrame):
    """A `WanTransformer3DModel`, or two, with UMT5's text encoder and a causal autoencoder.

    Made for bfloat16; the autoencoder is best in float32 (`dtype={"vae": torch.float32, …}`).

    Attributes:
        boundary_ratio: with two experts, the timestep, as a fraction of all, at and above which `transformer` denoises;
            below it, `transformer_2` does. So the last steps train only `transformer_2`.
        expand_timesteps: the transformer is told a timestep for each of its tokens (Wan 2.2 5B), and prompts may
            have an image, which the clip then starts from.
    """

    family = "WanPipeline"
    dtypes = {"default": torch.bfloat16, "vae": torch.float32}
    targets = {"transformer": ATTENTION, "transformer_2": ATTENTION}
    feed_forward = ("ffn.net.0.proj", "ffn.net.2")
    networks = {
        "transformer": WanTransformer3DModel,
        "transformer_2": WanTransformer3DModel,
        "vae": AutoencoderKLWan,
        "text_encoder": UMT5EncoderModel,
    }
    processors = {"tokenizer": AutoTokenizer}
    optional = ("transformer_2",)
    settings = {"boundary_ratio": None, "expand_timesteps": False}
    sampling_options = {"flow_shift": None}  # of the schedule; None: the scheduler's own
    option_bounds = {"flow_shift": (0.01, 1000)}
    independent_frames = False

    boundary_ratio: float | None = None
    expand_timesteps = False

    def __init__(self, name, defaults, world=None, **parts):
        self.name, self.world = name, world
        self.denoisers = {key: parts[key] for key in self.targets if key in parts}
        self.vae, self.scheduler = parts["vae"], parts["scheduler"]
        wan_vae.use_quick_norms(self.vae)
        self.original_names = original_names(parts["transformer"].config.num_layers)
        self.set_text_encoder(parts["text_encoder"], parts["tokenizer"])
        self.defaults = DEFAULTS | defaults
        self.set_decoder(self.defaults)
        if len(self.denoisers) == 2:
            own = self.defaults.get("guidance_scale_2")
            self.sampling_options = self.sampling_options | {"guidance_scale_2": own}
            self.option_bounds = self.option_bounds | {"guidance_scale_2": (0, 1000)}
        if self.dtype == torch.float64:  # diffusers holds some layers to float32, which is less
            for denoiser in self.denoisers.values():
                denoiser.double()

    @classmethod
    def published_for(cls, checkpoint) -> dict[str, dict]:
        return PUBLISHED[checkpoint.source]

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's, but for the layers that are held to float32."""
        return self.denoiser.get_parameter("patch_embedding.weight").dtype

    def decoders(self) -> list[nn.Module]:
        return [self.vae.post_quant_conv, self.vae.decoder]

    def blocks(self) -> list[nn.Module]:
        # By the names of all its classes, since an engine (FSDP) or a compiler derives its own class from a block's.
        return [
            module
            for denoiser in self.denoisers.values()
            for module in denoiser.modules()
            if "WanTransformerBlock" in {cls.__name__ for cls in type(module).__mro__}
        ]

    # ------------------------------------------------------------------ guidance

    def denoiser_at(self, t: torch.Tensor) -> nn.Module:
        return self.denoisers["transformer_2" if self.is_low_noise(t) else "transformer"]

    def is_low_noise(self, t: torch.Tensor) -> bool:
        if self.boundary_ratio is None:
            return False
        return bool(t < self.boundary_ratio * self.scheduler.config.num_train_timesteps)

    def branches(self, sampling) -> list[str]:
        scales = {sampling.guidance_scale, sampling.options.get("guidance_scale_2")}
        return ["prompt"] if scales <= {1, None} else ["negative", "prompt"]

    def combine(self, outputs, t, sampling) -> torch.Tensor:
        """Guidance; `guidance_scale_2`, where it is given, is that of the expert of low noise."""
        second = sampling.options.get("guidance_scale_2")
        if second is not None and self.is_low_noise(t):
            sampling = replace(sampling, guidance_scale=second)
        return super().combine(outputs, t, sampling)

    # ------------------------------------------------------------------ denoising

    def latent_shape(self, sampling) -> tuple[int, int, int, int]:
        denoiser: Any = self.denoiser
        config, patch = self.vae.config, denoiser.config.patch_size
        for name, cells in (("height", patch[1]), ("width", patch[2])):
            value, step = getattr(sampling, name), config.scale_factor_spatial * cells
            if value < step or value % step:
                raise ValueError(
                    f"{name}={value} must be a positive multiple of {step} pixels for {self.name}"
                )
        whole, rest = divmod(sampling.num_frames - 1, config.scale_factor_temporal)
        if rest:
            before = sampling.num_frames - rest
            raise ValueError(
                f"num_frames={sampling.num_frames} must be 1 more than a multiple of {config.scale_factor_temporal} "
                f"for {self.name}: use {before} or {before + config.scale_factor_temporal}"
            )
        size = (n // config.scale_factor_spatial for n in (sampling.height, sampling.width))
        return config.z_dim, 1 + whole, *size

    def initial_latents(self, sampling, generators) -> torch.Tensor:
        # In float32 at least, which the latents then keep, as in diffusers.
        shape = (len(generators), *self.latent_shape(sampling))
        dtype = torch.promote_types(self.dtype, torch.float32)
        return randn_tensor(shape, generator=generators, device=self.device, dtype=dtype)

    def new_scheduler(self, sampling):
        if not is_flow(self.scheduler):
            raise ValueError(
                f"{self.name!r} is a rectified flow: {type(self.scheduler).__name__} cannot sample it, "
                "UniPCMultistepScheduler(prediction_type='flow_prediction', use_flow_sigmas=True) can"
            )
        scheduler, steps = deepcopy(self.scheduler), sampling.num_inference_steps
        euler = type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
        if sampling.options["flow_shift"] is not None:
            shift = {"shift" if euler else "flow_shift": sampling.options["flow_shift"]}
            scheduler = type(scheduler).from_config(scheduler.config, **shift)
        if euler:
            # Its own default ends at a sigma that is shifted already and shifts it again: the last of 30 steps would
            # move the video by 0.009 instead of 0.094. `WanPipeline` takes that default.
            sigmas = torch.linspace(1, 1 / steps, steps).tolist()
            scheduler.set_timesteps(sigmas=sigmas, device=self.device)
        else:
            scheduler.set_timesteps(steps, device=self.device)
        return scheduler

    def predict(self, latents, t, inputs) -> torch.Tensor:
        denoiser: Any = self.denoiser_at(t)
        self.onload(denoiser)
        times = t.expand(len(latents))
        inputs = dict(inputs)
        first = inputs.pop("first", None)
        if self.expand_timesteps:
            latents, times = with_first(latents, first), self.token_times(latents, t, first)
        output = denoiser(latents.to(self.dtype), times, return_dict=False, **inputs)[0]
        return output.to(latents.dtype)

    # ------------------------------------------------------------------ decoding

    def decode(self, latents: torch.Tensor, frames: list[int] | None = None) -> torch.Tensor:
        self.onload(*self.decoders())
        return wan_vae.decode(self.vae, latents, frames)

    def decode_vjp(self, latents, frames, gradient, decode_chunk_size=1) -> torch.Tensor:
        """As the base's, latent by latent whatever `decode_chunk_size` says; see `CausalDecoder`."""
        self.onload(*self.decoders())
        return wan_vae.decode_vjp(self.vae, latents, frames, gradient, self.new_states())
