"""What every family of video models offers to the rest of the package."""

import functools
import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import nn

from ..offload import Turns

MODEL_LOCK = threading.RLock()


def alone(function: Callable) -> Callable:
    """One thread at a time. A server's threads, or a notebook's (some answer a widget's controls in a thread of their own
    while a cell runs), would use the same model and swap its adapter under each other."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with MODEL_LOCK:
            return function(*args, **kwargs)

    return run


class Conditioning(NamedTuple):
    """Text embeddings of the prompts and of the empty prompt, each (B, tokens, width)."""

    prompt: torch.Tensor
    empty: torch.Tensor


class VideoModel(ABC):
    """A text-to-video diffusion model: latents (B, C, F, H, W), frames (B, F, 3, H, W) in [0, 1].

    Attributes: `name`; `denoiser`, the module that gets the adapter; `scheduler`, any diffusers scheduler,
    which may be replaced as in diffusers; `defaults`, of sampling, under diffusers' argument names, plus
    `fps`; `targets`, the names of the denoiser's linear layers that an adapter attaches to.
    """

    name: str
    denoiser: nn.Module
    scheduler: object
    defaults: dict
    targets: tuple[str, ...]
    prefix: str  # of the denoiser's keys in a diffusers LoRA file: "unet" or "transformer"
    home = torch.device("cpu")  # where waits what is not at work, if something is offloaded
    turns: Turns | None = None  # without model offload all networks stay where they are

    @abstractmethod
    def modules(self) -> list[nn.Module]:
        """All networks."""

    @abstractmethod
    def decoders(self) -> list[nn.Module]:
        """The networks, or their parts, that `decode` runs."""

    @abstractmethod
    def encode(self, prompts: list[str]) -> Conditioning:
        """Text embeddings, without a graph."""

    @abstractmethod
    def initial_latents(
        self, num_frames: int, height: int, width: int, generators: list
    ) -> torch.Tensor:
        """Noise of unit variance (B, C, F, H, W), one clip a generator; sizes in pixels."""

    @abstractmethod
    def predict(self, latents, t, conditioning, guidance_scale, sequential=False) -> torch.Tensor:
        """The denoiser's output for scaled latents at timestep t, after classifier-free guidance, whose two branches
        run as one batch, or, sequential, one after the other."""

    @abstractmethod
    def decode(self, latents: torch.Tensor, frames: list[int]) -> torch.Tensor:
        """The clip's frames with these indices, (B, len(frames), 3, H, W) in [0, 1], differentiable."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The denoiser's parts that activation checkpointing wraps, one by one."""

    def branches(
        self, conditioning: Conditioning, guidance_scale: float
    ) -> list[tuple[float, Conditioning]]:
        """Guidance as a sum: (weight, conditioning) of calls without guidance, the prompt's first."""
        nothing = Conditioning(conditioning.empty, conditioning.empty)
        return [(guidance_scale, conditioning), (1 - guidance_scale, nothing)]

    def enable_model_cpu_offload(self) -> None:
        """From now on only the networks of the current stage (text, denoiser, decoder and reward) are on the model's
        device; the others wait in CPU memory. As in diffusers. It costs time: the denoiser comes twice a step."""
        self.turns = Turns(self.device, self.home)
        self.send_home(*self.modules())

    def send_home(self, *modules: nn.Module) -> None:
        """With model offload: these wait from now on until they are brought, a reward's networks for instance."""
        if self.turns is not None:
            for module in modules:
                self.turns.place(module, self.home)

    def bring(self, *modules: nn.Module) -> None:
        """With model offload: these have the device to themselves now."""
        if self.turns is not None:
            self.turns(*modules)

    @property
    def device(self) -> torch.device:
        """Where the work is done."""
        return next(self.denoiser.parameters()).device if self.turns is None else self.turns.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.denoiser.parameters()).dtype

    def new_scheduler(self, num_inference_steps: int):
        """A scheduler of its own for one trajectory: multistep solvers remember earlier outputs."""
        scheduler = deepcopy(self.scheduler)
        scheduler.set_timesteps(num_inference_steps, device=self.device)
        return scheduler

    def step(
        self, scheduler, output, t, latents, *, eta: float = 0.0, generators=None
    ) -> torch.Tensor:
        """The scheduler's next latents. Its `step` is differentiable; only diffusers' pipelines are not."""
        accepted = inspect.signature(scheduler.step).parameters
        extra = {"eta": eta} if "eta" in accepted else {}
        if "generator" in accepted:
            extra["generator"] = generators
        return scheduler.step(output, t, latents, **extra).prev_sample

    def predict_x0(self, scheduler, output, t, latents) -> torch.Tensor:
        """The clean latents that this output predicts from these latents, in one go."""
        if hasattr(scheduler, "convert_model_output"):  # multistep solvers
            if scheduler.config.get("algorithm_type", "dpmsolver++") not in (
                "dpmsolver++",
                "sde-dpmsolver++",
            ):
                raise ValueError(
                    f"{scheduler.config.algorithm_type} predicts noise, not the clean video; use dpmsolver++"
                )
            if scheduler.step_index is None:
                scheduler._init_step_index(t)
            return scheduler.convert_model_output(output, sample=latents)
        return deepcopy(scheduler).step(output, t, latents).pred_original_sample

    def add_noise(self, scheduler, latents: torch.Tensor, t, generators: list) -> torch.Tensor:
        """Clean latents noised to the level of timestep t."""
        from diffusers.utils.torch_utils import randn_tensor

        noise = randn_tensor(
            latents.shape, generator=generators, device=latents.device, dtype=latents.dtype
        )
        return scheduler.add_noise(
            latents, noise, torch.as_tensor(t, device=latents.device).expand(len(latents))
        )
