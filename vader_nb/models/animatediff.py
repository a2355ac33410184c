"""AnimateDiff (arXiv 2307.04725): Stable Diffusion 1.5 whose frames see each other through a motion adapter.

On the hub these are two repositories, joined here; directories are those of diffusers' `AnimateDiffPipeline`, which
hold the joined network. Text and decoder are handled as in ModelScope.
"""

from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.unets.unet_motion_model import MotionAdapter, UNetMotionModel
from diffusers.pipelines.animatediff.pipeline_animatediff import AnimateDiffPipeline
from torch import nn
from transformers import CLIPTextModel

from .modelscope import PUBLISHED as MODELSCOPE
from .modelscope import ModelScope

# The published architecture, for `from_config`; what is missing here is the classes' own default.
PUBLISHED = {
    "unet": {"sample_size": 64, "cross_attention_dim": 768, "use_motion_mid_block": False},
    "vae": MODELSCOPE["vae"],
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
    # As in its authors' inference-v3.yaml. With timestep_spacing="linspace" and Stable Diffusion's
    # set_alpha_to_one=False, which are often seen, the last step leaves the video as it is and teaches nothing.
    "scheduler": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "linear",
        "steps_offset": 1,
        "clip_sample": False,
    },
}
DEFAULTS = {"num_inference_steps": 50, "guidance_scale": 7.5, "num_frames": 16, "fps": 8}


class AnimateDiff(ModelScope):
    """A `UNetMotionModel` with CLIP's text encoder and a 2D autoencoder, which decodes frame by frame.

    For another Stable Diffusion or adapter, join them with diffusers' `AnimateDiffPipeline`, `save_pretrained` it and
    load that directory.
    """

    family = "AnimateDiffPipeline"
    networks = {"unet": UNetMotionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    published = PUBLISHED
    own_defaults = DEFAULTS

    @classmethod
    def from_pretrained(cls, checkpoint, *, name: str, dtypes: dict, **hub) -> Any:
        """Load a directory of `AnimateDiffPipeline`, or Stable Diffusion and a motion adapter from the hub."""
        model = super().from_pretrained(checkpoint, name=name, dtypes=dtypes, **hub)
        if (
            not checkpoint.directory
        ):  # Stable Diffusion's own is not the one that the adapter was trained with
            kind = cls.scheduler_class(checkpoint)
            model.scheduler = kind.from_config(PUBLISHED["scheduler"])
        return model

    @classmethod
    def read_network(cls, part: str, checkpoint, options: dict) -> Any:
        if part != "unet" or checkpoint.directory:
            return super().read_network(part, checkpoint, options)
        still = UNet2DConditionModel.from_pretrained(checkpoint.source, subfolder="unet", **options)
        # A variant or a revision is one of Stable Diffusion's repository.
        own = {key: options[key] for key in options.keys() - {"variant", "revision"}}
        motion = MotionAdapter.from_pretrained(checkpoint.parts["motion_adapter"], **own)
        return UNetMotionModel.from_unet2d(still, motion)

    def pipeline(self) -> Any:
        """diffusers' pipeline of the same parts; the motion adapter is in the denoiser already."""
        kind: Any = AnimateDiffPipeline
        parts = {name: self.part(name) for name in self.part_names()}
        return kind(**parts, motion_adapter=None)

    def blocks(self) -> list[nn.Module]:
        wrapped = {"ResnetBlock2D", "Transformer2DModel", "AnimateDiffTransformer3D"}
        return [
            module
            for module in self.denoiser.modules()
            if wrapped & {cls.__name__ for cls in type(module).__mro__}
        ]

    def latent_shape(self, sampling) -> tuple[int, int, int, int]:
        denoiser: Any = self.denoiser
        most = denoiser.config.motion_max_seq_length
        if sampling.num_frames > most:
            raise ValueError(
                f"num_frames={sampling.num_frames} must be at most {most} for {self.name}: its motion adapter "
                "has no positions for more frames"
            )
        return super().latent_shape(sampling)

    def predict(self, latents, t, inputs) -> Any:
        self.onload(self.denoiser)
        frames = latents.shape[2]
        # The network expects the text of each frame; its attention takes that of each clip, see TextOncePerClip.
        text = inputs["encoder_hidden_states"].repeat_interleave(frames, dim=0)
        return self.denoiser(latents, t, text, cross_attention_kwargs={"num_frames": frames}).sample
