"""GRPO for denoising: Flow-GRPO (Liu et al. 2025, arXiv 2505.05470) and DanceGRPO (Xue et al. 2025, 2505.07818)."""

from dataclasses import dataclass

import torch

from .policy_gradient import PolicyGradient


@dataclass
class GRPO(PolicyGradient):
    """Each clip is compared with the other clips of its prompt, over all processes; no statistics are kept.

    By default as Flow-GRPO runs SD3.5: the flow's ODE becomes an SDE with a = 0.7, no more than 10 steps in
    training however many make the final clips (denoising reduction, section 4.3), advantages in the group's standard
    deviations and within ± 5, guidance in the roll-out and in the gradient; each roll-out serves two updates, as in the
    code of both papers. Diffusion models take DDIM at eta = 1, as in DanceGRPO, whose flows have less noise
    (about noise_level = 0.3), no KL, and learn from timestep_fraction = 0.6. The papers' groups have 12 to 24 clips, on Wan
    4; beta = 0.004 is Flow-GRPO's KL for Wan, 0.04 for images.

    Args:
        group_size: clips of each prompt in a step; it divides the step's clips.
    """

    minibatches: int = 2
    group_size: int = 8
    num_inference_steps: int | None = 10

    @property
    def clips_per_prompt(self) -> int:
        return self.group_size

    def compare(self, prompts: list[str], rewards: torch.Tensor) -> torch.Tensor:
        groups = rewards.view(-1, self.group_size)
        centered = groups - groups.mean(dim=1, keepdim=True)
        return (centered / (groups.std(dim=1, correction=0, keepdim=True) + 1e-4)).flatten()
