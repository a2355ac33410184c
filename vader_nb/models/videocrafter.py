"""VideoCrafter2 (arXiv 2401.09047), one of the models that VADER tunes.

ModelScope's parts, with three things that diffusers does not have: an embedding of the frame rate, DDIM whose
clean video is scaled down at high noise, and the names in its authors' single file, `model.ckpt`.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.unets.unet_3d_condition import UNet3DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler, DDIMSchedulerOutput
from huggingface_hub import hf_hub_download
from torch.nn.functional import pad
from transformers import CLIPTokenizer

from ..hub import fill, state_dict
from .base import renamed
from .modelscope import DEFAULTS, ModelScope

FILE = "model.ckpt"
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.model."
DEEPSPEED = "_forward_module."
# In the file but not in the model: tables of the schedule, and what follows the text's second-to-last states.
SCHEDULE = {
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "scale_arr", "scale_factor", "logvar"),
    *("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod"),
    *("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance"),
    *("posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
}
UNUSED_TEXT = ("logit_scale", "text_projection", "transformer.resblocks.23.")
USED_TEXT = ("token_embedding.", "positional_embedding", "ln_final.", "transformer.resblocks.")


def module_names() -> dict[str, str]:
    """VideoCrafter's names of the UNet's modules -> diffusers'; what follows them is the same in both."""
    names = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "fps_embedding.0": "time_embedding.fps.linear_1",
        "fps_embedding.2": "time_embedding.fps.linear_2",
        "input_blocks.0.0": "conv_in",
        "init_attn.0": "transformer_in",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.temp_attentions.0",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    resnets = {"middle_block.0": "mid_block.resnets.0", "middle_block.3": "mid_block.resnets.1"}
    for i in range(4):
        places = [(f"input_blocks.{1 + 3 * i + j}", f"down_blocks.{i}", j) for j in range(2)]
        places += [(f"output_blocks.{3 * i + j}", f"up_blocks.{i}", j) for j in range(3)]
        for theirs, ours, j in places:
            resnets[f"{theirs}.0"] = f"{ours}.resnets.{j}"
            names[f"{theirs}.1"] = f"{ours}.attentions.{j}"
            names[f"{theirs}.2"] = f"{ours}.temp_attentions.{j}"
        names[f"input_blocks.{3 * i + 3}.0.op"] = f"down_blocks.{i}.downsamplers.0.conv"
        last = 3 if i else 1  # the deepest level has no attention
        names[f"output_blocks.{3 * i + 2}.{last}.conv"] = f"up_blocks.{i}.upsamplers.0.conv"
    inner = {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
    }
    for theirs, ours in resnets.items():
        names |= {f"{theirs}.{one}": f"{ours}.{other}" for one, other in inner.items()}
        names[f"{theirs}.temopral_conv"] = ours.replace("resnets", "temp_convs")  # their spelling
    return names


class TimeAndFps(TimestepEmbedding):
    """The embedding of the timestep plus that of the frame rate, which comes as `timestep_cond`."""

    def __init__(self, in_channels: int, time_embed_dim: int):
        super().__init__(in_channels, time_embed_dim)
        self.fps = TimestepEmbedding(in_channels, time_embed_dim)

    def forward(self, sample: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return super().forward(sample) + self.fps(condition)


class VideoCrafterUNet(UNet3DConditionModel):
    """diffusers' UNet with `TimeAndFps`: `timestep_cond` is the sinusoid of the frame rate."""

    @functools.wraps(UNet3DConditionModel.__init__)  # from_config looks at the signature
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        width = self.config["block_out_channels"][0]
        self.time_embedding = TimeAndFps(width, 4 * width)


class DynamicScaleDDIM(DDIMScheduler):
    """DDIM of latents = sqrt(alpha) * scale(t) * clean + sqrt(1 - alpha) * noise."""

    @staticmethod
    def scale(t) -> torch.Tensor:
        """From 1 at t = 0 down to 0.7 at t = 399, and 0.7 from there."""
        return 1 - 0.3 * (torch.as_tensor(t) / 399).clamp(0, 1)

    def set_timesteps(self, num_inference_steps: int, device=None) -> None:
        most = self.config["num_train_timesteps"] - self.config["steps_offset"]
        if num_inference_steps > most:
            raise ValueError(f"num_inference_steps={num_inference_steps} must be at most {most}")
        super().set_timesteps(num_inference_steps, device)

    def step(
        self, model_output, timestep, sample, eta=0.0, generator=None, **options
    ) -> DDIMSchedulerOutput:
        """As diffusers' DDIM, but clean latents are divided by this timestep's scale and multiplied by the next's."""
        plain: Any = super().step(model_output, timestep, sample, eta=eta, generator=generator)
        steps: Any = self.num_inference_steps
        before = timestep - self.config["num_train_timesteps"] // steps
        alpha = self.alphas_cumprod[before] if before >= 0 else self.final_alpha_cumprod
        scale = self.scale(timestep)
        clean = plain.pred_original_sample
        change = alpha**0.5 * (self.scale(before) / scale - 1)
        return DDIMSchedulerOutput(plain.prev_sample + change * clean, clean / scale)

    def add_noise(self, original_samples, noise, timesteps) -> torch.Tensor:
        scale = self.scale(timesteps).to(original_samples)
        scale = scale.view(-1, *[1] * (original_samples.ndim - 1))
        return super().add_noise(scale * original_samples, noise, timesteps)


class VideoCrafter2(ModelScope):
    """VideoCrafter2: ModelScope's parts, conditioned on the frame rate.

    `Sampling.options["fps"]`: the frame rate that the model is told, 1 to 60; 24 as in VADER.
    """

    family = "VideoCrafter2"
    targets = {"unet": ("to_q", "to_k", "to_v")}
    sampling_options = {"fps": 24}
    option_bounds = {"fps": (1, 60)}
    original_names = module_names()
    lora_formats = (*ModelScope.lora_formats, "vader")
    networks = ModelScope.networks | {"unet": VideoCrafterUNet}
    schedulers = {"DynamicScaleDDIM": DynamicScaleDDIM}
    own_defaults = DEFAULTS | {"guidance_scale": 12.0, "height": 320, "width": 512, "eta": 1.0}

    @classmethod
    def from_pretrained(cls, checkpoint, *, name, dtypes, **hub) -> Any:
        """Load `model.ckpt`, or a directory of `save_pretrained`, see `models.load`.

        Raises:
            ValueError: for keys of `model.ckpt` that are missing or unknown.
        """
        folder = checkpoint.directory
        if folder and (folder / "model_index.json").is_file():
            return super().from_pretrained(checkpoint, name=name, dtypes=dtypes, **hub)
        file = folder / FILE if folder else hf_hub_download(checkpoint.source, FILE, **hub)
        state = state_dict(file, mmap=True)
        with init_empty_weights(include_buffers=False):
            model: Any = cls.from_config(checkpoint, name=name)
        model.tokenizer = open_clip_tokenizer()
        for part, weights in model.sorted(state, file).items():
            dtype = dtypes.get(part, dtypes["default"])
            weights = {key: value.to(dtype) for key, value in weights.items()}
            module = model.denoiser if part == "unet" else getattr(model, part)
            fill(module, weights, f"{file} is not VideoCrafter2's")
        return model

    def sorted(self, state: Mapping[str, torch.Tensor], file) -> dict[str, dict]:
        """The tensors of `model.ckpt` by network, under diffusers' names."""
        state = {key.removeprefix(DEEPSPEED): value for key, value in state.items()}
        unet, vae, text, unknown = {}, {}, {}, []
        own = self.denoiser.state_dict()
        for key, value in state.items():
            name = renamed(key.removeprefix(UNET), self.original_names)
            if key.startswith(UNET) and name in own:
                # A convolution over one frame is a linear layer in diffusers.
                unet[name] = value.squeeze(-1) if value.ndim == own[name].ndim + 1 else value
            elif key.startswith(VAE):
                vae[key] = value
            elif key.removeprefix(TEXT).startswith(USED_TEXT + UNUSED_TEXT):
                if not key.removeprefix(TEXT).startswith(UNUSED_TEXT):
                    text[key] = value
            elif key not in SCHEDULE:
                unknown.append(key)
        converted = convert_ldm_vae_checkpoint(vae, self.vae.config)
        used = {value.data_ptr() for value in converted.values()}
        unknown += [key for key, value in vae.items() if value.data_ptr() not in used]
        if unknown:
            raise ValueError(
                f"{file} is not VideoCrafter2's: {len(unknown)} of its {len(state)} keys are unknown, "
                f"such as {', '.join(unknown[:5])}"
            )
        states = convert_open_clip_checkpoint(self.text_encoder, text)
        if not any(key.startswith("text_model.") for key in self.text_encoder.state_dict()):
            states = {key.removeprefix("text_model."): value for key, value in states.items()}
        return {"unet": unet, "vae": converted, "text_encoder": states}

    def encode(self, prompts, sampling=None, generators=None):
        fps = (sampling.options if sampling else self.sampling_options)["fps"]
        conditioning = super().encode(prompts, sampling)
        rates = torch.full((len(prompts),), float(fps), device=self.device)
        denoiser: Any = self.denoiser
        embedded = denoiser.time_proj(rates).to(self.dtype)
        for branch in conditioning.branches.values():
            branch["timestep_cond"] = embedded
        return conditioning

    def tokens(self, text: str) -> torch.Tensor:
        """As open_clip, which fills up with id 0; as a padding token it would swallow every "!" in a text."""
        length = self.tokenizer.model_max_length
        options = {"truncation": True, "max_length": length, "return_tensors": "pt"}
        ids = self.tokenizer(text, **options).input_ids
        return pad(ids, (0, length - ids.shape[1]))

    def signal_and_noise(self, scheduler, t):
        alpha, sigma = super().signal_and_noise(scheduler, t)
        if isinstance(scheduler, DynamicScaleDDIM):
            alpha = alpha * scheduler.scale(t).to(alpha)
        return alpha, sigma


def open_clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer, from the vocabulary that comes with open_clip."""
    from open_clip.tokenizer import SimpleTokenizer

    theirs = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): i for token, i in theirs.encoder.items()}
    merges: Any = list(theirs.bpe_ranks)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
