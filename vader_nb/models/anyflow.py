"""AnyFlow (arXiv 2605.13724) of Wan 2.1, text to video: diffusers' `AnyFlowPipeline` directories.

Wan's transformer, distilled into a flow map: given two times, t and r, it predicts the mean velocity between them, and
a step goes from t to r in a straight line. A few steps are enough, so the gradient through all of them is affordable:
with 4 steps, `Last(4)` gives that of the whole chain.
"""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import diffusers
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import nn
from transformers import UMT5EncoderModel

from .base import Conditioning, instances
from .wan import ATTENTION, Wan
from .wan_configs import SMALL, T5

DEFAULTS = {"num_inference_steps": 4, "guidance_scale": 1.0}


class AnyFlow(Wan):
    """An `AnyFlowTransformer3DModel` with Wan's text encoder and autoencoder; guidance is in its weights.

    The clean latents that a step predicts, for strategies that stop early, lie on its straight line.
    """

    family = "AnyFlowPipeline"
    targets = {"transformer": ATTENTION}
    networks = {
        "transformer": getattr(diffusers, "AnyFlowTransformer3DModel", None),
        "vae": AutoencoderKLWan,
        "text_encoder": UMT5EncoderModel,
    }
    optional = ()
    settings = {}
    published = {"transformer": SMALL, "vae": {}, "text_encoder": T5, "scheduler": {"shift": 5.0}}
    sampling_options = {}
    option_bounds = {}

    def __init__(self, name, defaults, world=None, **parts):
        super().__init__(name, DEFAULTS | defaults, world, **parts)

    @classmethod
    def of(cls, checkpoint, name: str, parts: dict[str, Any], index: dict) -> Any:
        # The index of its authors, whose classes diffusers does not have, names another pipeline.
        return super().of(replace(checkpoint, family=cls.family), name, parts, index)

    @classmethod
    def present(cls, kinds: dict[str, Any], index: dict) -> dict[str, Any]:
        """As the base's. Raises ImportError for a diffusers that is too old for AnyFlow."""
        if None in kinds.values():
            raise ImportError(
                f"diffusers {diffusers.__version__} has no AnyFlow: pip install -U diffusers"
            )
        return super().present(kinds, index)

    @classmethod
    def scheduler_class(cls, checkpoint) -> Any:
        own = replace(checkpoint, scheduler="FlowMapEulerDiscreteScheduler")
        return super().scheduler_class(own)

    @classmethod
    def published_for(cls, checkpoint) -> dict[str, dict]:
        return cls.published

    def blocks(self) -> list[nn.Module]:
        return instances(self.denoiser, {"AnyFlowTransformerBlock"})

    # ------------------------------------------------------------------ from t to r

    def new_scheduler(self, sampling):
        if type(self.scheduler).__name__ != "FlowMapEulerDiscreteScheduler":
            raise ValueError(
                f"{self.name!r} is a flow map: {type(self.scheduler).__name__} cannot sample it, "
                "FlowMapEulerDiscreteScheduler can"
            )
        scheduler = deepcopy(self.scheduler)
        scheduler.set_timesteps(sampling.num_inference_steps, device=self.device)
        return scheduler

    def encode(self, prompts, sampling: Any = None, generators=None) -> Conditioning:
        """Wan's conditioning, and the trajectory's timesteps (B, steps), in which a step looks up its r."""
        conditioning = super().encode(prompts, sampling, generators)
        times = self.new_scheduler(sampling).timesteps.expand(len(prompts), -1)
        branches = conditioning.branches.items()
        return Conditioning({name: inputs | {"timesteps": times} for name, inputs in branches})

    def predict(self, latents, t, inputs) -> torch.Tensor:
        self.onload(self.denoiser)
        frames = latents.transpose(1, 2).to(self.dtype)
        t, r = torch.broadcast_tensors(t, following(inputs["timesteps"], t)[:, None])
        t, r = (x.expand(frames.shape[:2]) for x in (t, r))
        text = inputs["encoder_hidden_states"]
        output = self.denoiser(frames, t, r, text, return_dict=False)[0]
        return output.transpose(1, 2).to(latents.dtype)

    def step(self, scheduler, output, t, latents, *, eta=0.0, generators=None) -> torch.Tensor:
        # By arithmetic alone: the scheduler's own looks for t, which waits for the GPU. In float64, as there.
        length = (t - following(scheduler.timesteps, t)) / scheduler.config.num_train_timesteps
        return (latents - length[None] * output).to(latents.dtype)

    def signal_and_noise(self, scheduler, t) -> tuple[torch.Tensor, torch.Tensor]:
        sigma = t / scheduler.config.num_train_timesteps
        return 1 - sigma, sigma


def following(timesteps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The next of falling timesteps (…, steps) after t; 0 after the last."""
    return (timesteps * (timesteps < t)).amax(-1)
