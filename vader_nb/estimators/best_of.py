"""Best of n: no training, n times the sampling."""

from dataclasses import dataclass
from typing import Any

import torch

from ..models import VideoModel
from ..rewards import Reward, as_reward
from ..sampling import derived_seed, sample


@dataclass
class BestOf:
    """Of n clips of each prompt, the one with the highest reward; `evaluate` takes it in place of an adapter.

        evaluate(model, {"GRPO": run, "best of 8": BestOf(8, reward)}, reward, prompts)

    The first clip of each n is the one that sampling alone would make.

    Args:
        n: clips sampled, and scored, for each.
        reward: chooses the clip; it needs no gradient.
        adapter: to sample with, as for `sample`; None: the base model.
    """

    n: int
    reward: Reward
    adapter: Any = None

    def __post_init__(self):
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")
        self.reward = as_reward(self.reward)

    @torch.no_grad()
    def sample(self, model: VideoModel, prompts, *, seeds: list[int], **options) -> torch.Tensor:
        """As `sample`, one seed per clip."""
        self.reward.at_fps(model.defaults["fps"])
        best, clips = self.candidates(model, prompts, seeds, 0, options)
        for k in range(1, self.n):
            rewards, frames = self.candidates(model, prompts, seeds, k, options)
            better = rewards > best
            best = torch.where(better, rewards, best)
            clips = torch.where(better[:, None, None, None, None], frames, clips)
        return clips

    def candidates(self, model: VideoModel, prompts, seeds, k: int, options) -> tuple:
        """The k-th clip of each prompt and its reward: (B,), (B, F, 3, H, W)."""
        own = [derived_seed(seed, k) for seed in seeds]
        frames = sample(model, prompts, seeds=own, **options)
        model.onload(*self.reward.networks)
        if model.offloader is None:
            self.reward.to(model.device)
        rewards = self.reward(frames, [str(prompt) for prompt in prompts])
        return rewards.to(frames.device), frames
