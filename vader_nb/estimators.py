"""Estimators: what turns a batch of prompts into a gradient on the adapter.

For one optimizer step the trainer calls `collect` for each micro-batch, `advantages` once with all that was
collected, and `accumulate` for each; the last, and the update after it, `updates_per_rollout` times.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from . import experts, gradient
from .lora import Adapter
from .models import VideoModel
from .prompts import Prompt
from .rewards import Reward, record_parts
from .sampling import Rollout, Sampling
from .strategies import Frames, Plan, Strategy


@dataclass
class Batch:
    """One micro-batch of one process.

    Attributes:
        prompts, seeds: one per clip.
        generator: for what the estimator draws; seeded by (seed, step, micro-batch).
    """

    prompts: Sequence[str | Prompt]
    seeds: list[int]
    generator: torch.Generator


@dataclass
class Collected:
    """A roll-out of one micro-batch, without a graph.

    Attributes:
        rollout: `states` and `outputs` hold the steps that the estimator learns from.
        plan, frames: the steps that learn, and indices of the frames that are scored.
        rewards, advantages: (B,), where the estimator needs them before it takes the gradient.
    """

    rollout: Rollout
    plan: Plan
    frames: list[int]
    rewards: torch.Tensor | None = None
    advantages: torch.Tensor | None = None


@dataclass
class Row:
    """What one `accumulate` reports.

    Attributes:
        rewards: (B,).
        parts: (B,) for every part of a mixed reward, by its name.
        info: recorded in metrics.jsonl as it is.
    """

    rewards: torch.Tensor
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    info: dict = field(default_factory=dict)


class Estimator(ABC):
    """Base class. `setup` is called once, before training.

    Attributes:
        updates_per_rollout: optimizer updates for each collected batch.
        needs_reward_gradient: the reward must be differentiable in the frames.
        compares_rollouts: all of a step's batches are collected before the first is accumulated; else one
            is in memory at a time.
    """

    updates_per_rollout = 1
    needs_reward_gradient = False
    compares_rollouts = True

    def strategy_of(self, config) -> Strategy | None:
        """Chooses the steps that learn, by a `TrainConfig`; None: any may."""
        return None

    def setup(self, model: VideoModel, adapter: Adapter, reward: Reward, config) -> None:
        """Remember what to work with; `config` is the run's `TrainConfig`, sampling resolved."""
        self.model, self.adapter, self.reward = model, adapter, reward
        self.sampling: Sampling = config.sampling

    def check_reward(self, reward: Reward) -> None:
        """Raises ValueError for a reward without the gradient that this needs."""
        if not self.needs_reward_gradient or reward.differentiable:
            return
        lacking = [part for part in reward.parts() if not part.differentiable] or [reward]
        instead = "; or train on " + lacking[0].instead if lacking[0].instead else ""
        raise ValueError(
            f"reward {lacking[0].name!r} is not differentiable, which this estimator needs. Judge with it: "
            f"held_out_reward=… in a shell, evaluate(…, held_out=[…]) in Python{instead}"
        )

    @abstractmethod
    def collect(self, batch: Batch) -> Collected:
        """Sample a batch, without a graph."""

    def advantages(self, collected: list[Collected], gather: Callable) -> None:  # noqa: B027
        """Between roll-out and gradient: compare rewards; gather(value) lists those of all processes."""

    @abstractmethod
    def accumulate(
        self, collected: Collected, weight: float, backward: Callable[[torch.Tensor], None]
    ) -> Row:
        """Add  weight * gradient of a loss  to `.grad` of the adapter's parameters.

        Args:
            weight: 1 / the number of micro-batches.
            backward: runs the backward pass of a scalar.
        """


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
        given = self.model.given_frames(batch.prompts)
        frames = self.frames.choose(self.sampling.num_frames, batch.generator, given)
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
