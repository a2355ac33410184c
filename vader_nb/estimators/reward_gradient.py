"""The reward's own gradient, backpropagated through the last denoising steps."""

import torch

from .. import experts, gradient
from ..rewards import record_parts
from ..strategies import Frames, Strategy
from .base import Batch, Collected, Estimator, Row


class RewardGradient(Estimator):
    """The reward's own gradient, backpropagated through the last denoising steps: VADER, DRaFT, ReFL, …

    Args:
        strategy: which steps learn; default: the configuration's.
        frames: which frames are scored; default: the configuration's.
    """

    needs_reward_gradient = True
    compares_rollouts = False

    def __init__(self, strategy: Strategy | None = None, frames: Frames | None = None):
        self._strategy, self._frames = strategy, frames

    def strategy_of(self, config) -> Strategy:
        return self._strategy or config.strategy

    def setup(self, model, adapter, reward, config) -> None:
        super().setup(model, adapter, reward, config)
        self.strategy = self.strategy_of(config)
        self.frames: Frames = self._frames or config.frames
        names = ("decode_chunk_size", "activation_offload", "gradient_checkpointing")
        self.settings = {name: getattr(config, name) for name in names}

    def collect(self, batch: Batch) -> Collected:
        of = self.model, self.adapter, self.sampling
        plan = experts.draw_plan(*of, self.strategy, batch.generator)
        frames = self.frames.choose(self.sampling.num_frames, batch.generator)
        rollout = gradient.rolled_out(
            self.model,
            self.adapter,
            batch.prompts,
            batch.seeds,
            self.sampling,
            plan,
            **self.settings,
        )
        return Collected(rollout, plan, frames)

    def accumulate(self, collected, weight, backward) -> Row:
        with record_parts() as scores:
            result = gradient.accumulate(
                self.model,
                self.adapter,
                self.reward,
                collected.rollout,
                collected.plan,
                collected.frames,
                weight=weight,
                backward=backward,
                **self.settings,
            )
        parts = {name: torch.cat(values, dim=1).mean(dim=1) for name, values in scores.items()}
        return Row(result.rewards, parts, {"frames": collected.frames})
