"""One denoising step as a Gaussian, for methods that need to know how probable it was: DDPO, GRPO.

With  x = alpha * clean + sigma * noise  at a step, and alpha', sigma' after it, the step goes to

    x' = alpha' * clean(x) + direction * noise(x) + std * z,    z normal,

where clean(x) and noise(x) are what the denoiser's output says of x. A diffusion's step is DDIM's with eta (arXiv
2010.02502, equation 16), written for any alpha and sigma: eta = 1 is DDPM's. A rectified flow's is the SDE of
Flow-GRPO (arXiv 2505.05470, equation 9), whose `a` is the noise level. A step to clean latents adds no noise.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from .models import VideoModel
from .models.base import is_flow


@dataclass(frozen=True)
class Transition:
    """One step of a chain.

    Attributes:
        model, scheduler, t: whose step, and at which timestep of the scheduler, which has taken no step.
        alpha, sigma: before it.
        alpha_next, direction, std: see above; std 0: it is deterministic.
    """

    model: VideoModel
    scheduler: Any
    t: torch.Tensor
    alpha: float
    sigma: float
    alpha_next: float
    direction: float
    std: float

    def mean(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The step's mean (B, C, F, H, W), in float32 at least, given the guided output at these latents."""
        output, latents = widened(output), widened(latents)
        clean = self.model.x0(self.scheduler, output, self.t, latents)
        noise = (latents - self.alpha * clean) / self.sigma
        return self.alpha_next * clean + self.direction * noise

    def sample(
        self, output: torch.Tensor, latents: torch.Tensor, generators: list[torch.Generator]
    ) -> torch.Tensor:
        """The next latents, their noise drawn from one generator per clip."""
        mean = self.mean(output, latents)
        if self.std:
            options = {"device": mean.device, "dtype": mean.dtype}
            mean = mean + self.std * randn_tensor(mean.shape, generator=generators, **options)
        return mean.to(latents.dtype)

    def log_prob(self, mean: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        """Log-density (B,) of the next latents, as the mean over their entries: the convention of DDPO's code, to
        which its published clip range applies."""
        distance = (widened(following) - mean) / self.std
        density = -(distance**2) / 2 - math.log(self.std * math.sqrt(2 * math.pi))
        return density.mean(dim=tuple(range(1, mean.ndim)))

    def divergence(self, mean: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """KL (B,) between two such steps with these means, as the mean over entries."""
        return ((mean - other) ** 2 / (2 * self.std**2)).mean(dim=tuple(range(1, mean.ndim)))


def widened(values: torch.Tensor) -> torch.Tensor:
    """In float32 at least: half precision would round a step's noise away."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def transition(model: VideoModel, sampling, i: int, noise_level: float | None = None) -> Transition:
    """The step of index i, counted from 0, the noisiest.

    Args:
        noise_level: see `default_noise_level`.

    Raises:
        ValueError: for a scheduler whose steps are not such Gaussians.
    """
    scheduler = model.new_scheduler(sampling)
    name = type(scheduler).__name__
    if getattr(scheduler, "order", 1) != 1 or "FlowMap" in name:
        raise ValueError(
            f"the steps of {name} have no known probability; choose a first-order scheduler for {model.name!r}"
        )
    level = default_noise_level(model, sampling) if noise_level is None else noise_level
    t = scheduler.timesteps[i]
    alpha, sigma = levels(model, scheduler, t)
    alpha_next, sigma_next = after(model, sampling, i)
    if not sigma_next:
        direction = std = 0.0
    elif is_flow(scheduler):
        # At sigma = 1 the rate is infinite; as in the paper's code the next sigma stands in.
        rate = level * math.sqrt(sigma / (1 - (sigma if sigma < 1 else sigma_next)))
        std = rate * math.sqrt(sigma - sigma_next)
        direction = sigma_next - std**2 / (2 * sigma)
    else:
        left = sigma**2 - (alpha / alpha_next * sigma_next) ** 2
        std = level * sigma_next / sigma * math.sqrt(max(left, 0))
        direction = math.sqrt(max(sigma_next**2 - std**2, 0))
    return Transition(model, scheduler, t, alpha, sigma, alpha_next, direction, std)


def after(model: VideoModel, sampling, i: int) -> tuple[float, float]:
    """(alpha, sigma) after the step of index i."""
    scheduler = model.new_scheduler(sampling)
    if hasattr(
        scheduler, "final_alpha_cumprod"
    ):  # DDIM, whose next timestep need not be in its list
        config = scheduler.config
        t = (
            int(scheduler.timesteps[i])
            - config.num_train_timesteps // scheduler.num_inference_steps
        )
        if t < 0:
            end = float(scheduler.final_alpha_cumprod)
            return end**0.5, (1 - end) ** 0.5
    elif i + 1 < len(scheduler.timesteps):
        t = scheduler.timesteps[i + 1]
    else:
        return 1.0, 0.0
    return levels(model, scheduler, t)


def levels(model: VideoModel, scheduler, t) -> tuple[float, float]:
    """(alpha, sigma) at timestep t of a scheduler that has taken no step."""
    alpha, sigma = map(float, model.signal_and_noise(scheduler, t))
    return (1 - sigma if is_flow(scheduler) else alpha), sigma  # not as rounded to float32


def default_noise_level(model: VideoModel, sampling) -> float:
    """Flow-GRPO's 0.7 for a flow; else eta, that of the settings or, where it is 0, DDPO's 1."""
    return 0.7 if is_flow(model.new_scheduler(sampling)) else sampling.eta or 1.0
