"""Stable Video Diffusion (arXiv 2311.15127), image to video, and the embedded `tiny-i2v` model.

Both are diffusers `StableVideoDiffusionPipeline` directories. A clip starts from the image of its
`Prompt`, which its first frame also shows. There is no text encoder: the text is only for rewards.
The decoder mixes the frames that it is given, so a clip is decoded whole, or in independent chunks.
"""

from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import (
    AutoencoderKLTemporalDecoder,
)
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import (
    _resize_with_antialiasing,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from torch.func import functional_call
from torch.nn.functional import interpolate
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from ..prompts import Prompt
from ..zoo import world
from .base import Conditioning
from .parts import ModelOfParts

# The published architecture, for `from_config`; what is missing here is the classes' own default.
PUBLISHED = {
    "unet": {"sample_size": 96, "cross_attention_dim": 1024, "num_frames": 14},
    "vae": {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "layers_per_block": 2,
    },
    "image_encoder": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "projection_dim": 1024,
        "hidden_act": "gelu",
    },
    "scheduler": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "use_karras_sigmas": True,
        "sigma_min": 0.002,
        "sigma_max": 700.0,
        "timestep_type": "continuous",
        "timestep_spacing": "leading",
        "steps_offset": 1,
    },
}
DEFAULTS = {
    "num_inference_steps": 25,
    "guidance_scale": 3.0,
    "fps": 7,
    "height": 576,
    "width": 1024,
    "decode_chunk_size": None,
}


class StableVideoDiffusion(ModelOfParts):
    """A `UNetSpatioTemporalConditionModel` that continues an image, with a temporal decoder.

    `defaults["decode_chunk_size"]` says how many frames the decoder mixes; None for the whole clip, as in
    diffusers. Chunks are independent of each other, so any frame is decoded exactly from its chunk.
    """

    family = "StableVideoDiffusionPipeline"
    targets = {"unet": ("to_q", "to_k", "to_v", "to_out.0")}
    feed_forward = (*ModelOfParts.feed_forward, "ff_in.net.0.proj", "ff_in.net.2")
    networks = {
        "unet": UNetSpatioTemporalConditionModel,
        "vae": AutoencoderKLTemporalDecoder,
        "image_encoder": CLIPVisionModelWithProjection,
    }
    processors = {"feature_extractor": CLIPImageProcessor}
    published = PUBLISHED
    sampling_options = {
        "min_guidance_scale": 1.0,  # at the first frame; guidance_scale is that of the last one
        "fps": 7,
        "motion_bucket_id": 127,
        "noise_aug_strength": 0.02,
    }
    option_bounds = {
        "min_guidance_scale": (0, 1000),
        "fps": (1, 1000),
        "motion_bucket_id": (0, 1023),
        "noise_aug_strength": (0, 100),
    }
    takes_image = True
    independent_frames = False

    def __init__(
        self, name, unet, vae, image_encoder, feature_extractor, scheduler, defaults, world=None
    ):
        self.name, self.world, self.vae = name, world, vae
        self.denoisers = {"unet": unet}
        self.image_encoder, self.feature_extractor = image_encoder, feature_extractor
        self.scheduler = scheduler
        self.scale = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels per latent, 8
        self.defaults = DEFAULTS | {"num_frames": unet.config.num_frames} | defaults
        vae.enable_gradient_checkpointing()  # acts only where there is a graph, and is exact

    def decoders(self) -> list[nn.Module]:
        return [self.vae.decoder]

    def blocks(self) -> list[nn.Module]:
        wrapped = {"SpatioTemporalResBlock", "TransformerSpatioTemporalModel"}
        return [
            module
            for module in self.denoiser.modules()
            if wrapped & {cls.__name__ for cls in type(module).__mro__}
        ]

    # ------------------------------------------------------------------ the image

    @torch.no_grad()
    def encode(self, prompts, sampling: Any = None, generators=None) -> Conditioning:
        """The images of the prompts: CLIP's embedding, and the latents that every frame is given.

        The guidance's negative branch has zeros in the place of both. Noise of `noise_aug_strength` is drawn
        from the clips' generators, before their initial latents, as in diffusers.
        """
        sampling = sampling.resolve(self)
        generators = generators or [torch.Generator().manual_seed(0) for _ in prompts]
        self.onload(self.image_encoder, self.vae)
        images = [self.image_of(prompt, rng) for prompt, rng in zip(prompts, generators)]
        embedded = torch.cat([self.embed_image(image) for image in images])
        size = sampling.height, sampling.width
        pixels = torch.cat([resized(image, size) for image in images]).to(self.device) * 2 - 1
        noise = randn_tensor(pixels.shape, generators, pixels.device, pixels.dtype)
        strength = sampling.options["noise_aug_strength"]
        latents = self.encode_pixels(pixels + strength * noise).to(self.dtype)
        ids = [sampling.options["fps"] - 1, sampling.options["motion_bucket_id"], strength]
        added = torch.tensor([ids] * len(prompts), dtype=self.dtype, device=self.device)
        prompt = {"encoder_hidden_states": embedded, "image_latents": latents}
        negative = {key: torch.zeros_like(value) for key, value in prompt.items()}
        ids = {"added_time_ids": added}
        return Conditioning({"negative": negative | ids, "prompt": prompt | ids})

    def image_of(self, prompt: str | Prompt, generator: torch.Generator) -> torch.Tensor:
        """The image (1, 3, H, W) in [0, 1] that a clip starts from.

        For a caption of the tiny world without an image, the model of that world is given the first frame
        of such a clip.
        """
        image = getattr(prompt, "image", None)
        spec = world.parse(str(prompt)) if self.world == "tiny" and image is None else None
        if spec is not None:
            return world.render([spec], generator)[0, :1]
        return checked_image(self.name, prompt)

    def embed_image(self, image: torch.Tensor) -> torch.Tensor:
        """CLIP's embedding (1, 1, width) of an image (1, 3, H, W) in [0, 1]."""
        size = (self.image_encoder.config.image_size,) * 2
        small = (_resize_with_antialiasing(image * 2 - 1, size) + 1) / 2
        mean, std = (
            torch.tensor(values).view(1, 3, 1, 1)
            for values in (self.feature_extractor.image_mean, self.feature_extractor.image_std)
        )
        dtype = next(self.image_encoder.parameters()).dtype
        embedded = self.image_encoder(((small - mean) / std).to(self.device, dtype)).image_embeds
        return embedded[:, None].to(self.dtype)

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """The autoencoder's latents (B, 4, h, w), not scaled, of pixels in [-1, 1]."""
        dtype = self.vae.dtype
        if dtype == torch.float16 and self.vae.config.force_upcast:  # float16 overflows in it
            dtype = torch.float32
        moments = pixels.to(dtype)
        for network in (self.vae.encoder, self.vae.quant_conv):
            weights = {name: p.to(dtype) for name, p in network.named_parameters()}
            moments = functional_call(network, weights, (moments,))
        return moments.chunk(2, dim=1)[0]

    # ------------------------------------------------------------------ denoising

    def latent_shape(self, sampling) -> tuple[int, int, int, int]:
        for name in ("height", "width"):
            value = getattr(sampling, name)
            if value < self.scale or value % self.scale:
                raise ValueError(
                    f"{name}={value} must be a positive multiple of {self.scale} pixels for {self.name}"
                )
        denoiser: Any = self.denoiser
        channels = denoiser.config.out_channels
        size = sampling.height // self.scale, sampling.width // self.scale
        return channels, sampling.num_frames, *size

    def initial_latents(self, sampling, generators) -> torch.Tensor:
        channels, frames, *size = self.latent_shape(sampling)
        shape = (len(generators), frames, channels, *size)  # drawn as diffusers does
        noise = randn_tensor(shape, generator=generators, device=self.device, dtype=self.dtype)
        return noise.transpose(1, 2).contiguous()

    def predict(self, latents, t, inputs) -> torch.Tensor:
        self.onload(self.denoiser)
        image = inputs["image_latents"][:, :, None].expand(-1, -1, latents.shape[2], -1, -1)
        both = torch.cat([latents, image], dim=1).transpose(1, 2)
        states, ids = inputs["encoder_hidden_states"], inputs["added_time_ids"]
        return self.denoiser(both, t, states, ids, return_dict=False)[0].transpose(1, 2)

    def combine(self, outputs, t, sampling) -> torch.Tensor:
        """Guidance that grows from the first frame, which the image gives, to the last."""
        if len(outputs) == 1:
            return outputs["prompt"]
        negative, prompt = outputs["negative"], outputs["prompt"]
        ends = sampling.options["min_guidance_scale"], sampling.guidance_scale
        scale = torch.linspace(*ends, prompt.shape[2]).to(prompt)
        return negative + scale.view(1, 1, -1, 1, 1) * (prompt - negative)

    # ------------------------------------------------------------------ decoding

    def chunks(self, count: int, frames: list[int]) -> dict[range, list[int]]:
        """The decoder's chunks of a clip of `count` frames, each with the places in `frames` that it holds."""
        size = self.defaults["decode_chunk_size"] or count
        held: dict[range, list[int]] = {}
        for place, frame in enumerate(frames):
            start = frame % count // size * size
            held.setdefault(range(start, min(start + size, count)), []).append(place)
        return held

    def decode(self, latents: torch.Tensor, frames: list[int] | None = None) -> torch.Tensor:
        self.onload(*self.decoders())
        count = latents.shape[2]
        frames = list(range(count)) if frames is None else [frame % count for frame in frames]
        decoded: list[Any] = [None] * len(frames)
        for chunk, places in self.chunks(count, frames).items():
            clips = [self.decode_chunk(clip[:, chunk.start : chunk.stop]) for clip in latents]
            for place in places:
                decoded[place] = torch.stack([clip[frames[place] - chunk.start] for clip in clips])
        return torch.stack(decoded, dim=1)

    def decode_chunk(self, latents: torch.Tensor) -> torch.Tensor:
        """Frames (f, 3, H, W) in [0, 1] of consecutive latents (C, f, h, w) of one clip."""
        scaled = (latents.transpose(0, 1) / self.vae.config.scaling_factor).to(self.vae.dtype)
        pixels = self.vae.decode(scaled, num_frames=len(scaled)).sample
        return (pixels / 2 + 0.5).clamp(0, 1)

    def decode_vjp(self, latents, frames, gradient, decode_chunk_size=1) -> torch.Tensor:
        """As the base's; a chunk that the decoder mixes is decoded once, whatever `decode_chunk_size` says."""
        leaf = latents.detach().requires_grad_()
        with torch.enable_grad():
            for places in self.chunks(latents.shape[2], frames).values():
                chosen = [frames[place] for place in places]
                self.decode(leaf, chosen).backward(gradient[:, places])
        assert leaf.grad is not None
        return leaf.grad


def resized(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """An image (1, 3, H, W) in [0, 1] at another height and width."""
    if image.shape[-2:] == size:
        return image
    return interpolate(image, size, mode="bicubic", antialias=True).clamp(0, 1)


def checked_image(name: str, prompt: str | Prompt) -> torch.Tensor:
    """The image (1, 3, H, W) in [0, 1] of a prompt for the model of this name.

    Raises:
        ValueError: if it has none, or a tensor that is not an image.
    """
    image = getattr(prompt, "image", None)
    if image is None:
        raise ValueError(
            f"{name!r} continues an image: give Prompt({str(prompt)!r}, image=…) with a tensor "
            f"(3, H, W) in [0, 1]"
        )
    if not isinstance(image, torch.Tensor):  # PIL's
        image = VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(image))[0]
    if image.ndim != 3 or len(image) != 3 or not image.is_floating_point():
        raise ValueError(
            f"an image must be a float tensor (3, H, W) in [0, 1], got {image.dtype} of shape "
            f"{tuple(image.shape)}"
        )
    if not 0 <= image.min() <= image.max() <= 1:
        raise ValueError(
            f"an image's values must lie in [0, 1], got {image.min():g} to {image.max():g}"
        )
    return image[None].float()
