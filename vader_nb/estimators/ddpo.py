"""DDPO (Black et al. 2023, arXiv 2305.13301): PPO on the denoising chain, advantages by each prompt's history."""

from collections import deque
from dataclasses import dataclass

import torch

from .policy_gradient import PolicyGradient


@dataclass
class DDPO(PolicyGradient):
    """DDPO with importance sampling (section 4.3), by default as its authors run it.

    DDIM at eta = 1, guidance in the roll-out and in the gradient, every step that adds noise learns (the last one adds
    none), two updates per roll-out on half the clips each; clip range 1e-4, advantages within ± 10. A clip's advantage
    is its reward minus the mean of its prompt's latest rewards, in their standard deviations; while those are few,
    the step's are used (appendix). It works best with few prompts and many clips per step.

    Args:
        buffer_size: rewards remembered for each prompt.
        min_count: how many there must be before they are used.
    """

    minibatches: int = 2
    adv_clip: float = 10.0
    buffer_size: int = 16
    min_count: int = 16

    def setup(self, model, adapter, reward, config) -> None:
        super().setup(model, adapter, reward, config)
        self.history: dict[str, deque[float]] = {}

    def compare(self, prompts: list[str], rewards: torch.Tensor) -> torch.Tensor:
        advantages = torch.empty_like(rewards)
        for prompt in dict.fromkeys(prompts):
            places = [i for i, other in enumerate(prompts) if other == prompt]
            known = self.history.setdefault(prompt, deque(maxlen=self.buffer_size))
            known.extend(rewards[places].tolist())
            enough = len(known) >= self.min_count
            base = rewards.new_tensor(list(known)) if enough else rewards
            centered = rewards[places] - base.mean()
            advantages[places] = centered / (base.std(correction=0) + 1e-6)
        return advantages

    def state(self) -> dict:
        return {prompt: list(known) for prompt, known in self.history.items()}

    def restore(self, state: dict) -> None:
        self.history = {prompt: deque(known, self.buffer_size) for prompt, known in state.items()}
