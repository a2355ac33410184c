"""Estimators: what turns a batch of prompts into a gradient on the adapter.

In one step the trainer calls `collect` for each micro-batch, `advantages` once with all that was collected,
and `accumulate` for each (of a `minibatch`). `accumulate`, and the update after it, are run `updates_per_rollout`
times.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from ..lora import Adapter
from ..models import VideoModel
from ..prompts import Prompt
from ..rewards import Reward
from ..sampling import Rollout, Sampling
from ..strategies import Plan, Strategy


@dataclass
class Batch:
    """One micro-batch of one process.

    Attributes:
        prompts, seeds: one per clip.
        generator: for what the estimator draws; seeded by (seed, step, micro-batch).
        index: its place among the step's micro-batches of all processes.
    """

    prompts: Sequence[str | Prompt]
    seeds: list[int]
    generator: torch.Generator
    index: int = 0


@dataclass
class Collected:
    """A roll-out of one micro-batch, without a graph.

    Attributes:
        rollout: `states` and `outputs` hold the steps that the estimator learns from.
        plan, frames: the steps that a reward's gradient goes through, and indices of the frames that are scored.
        rewards, advantages: (B,), where the estimator needs them before it takes the gradient.
        generator: of its batch, where later updates draw, too.
    """

    rollout: Rollout
    plan: Plan
    frames: list[int]
    generator: torch.Generator | None = None
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
        clips_per_prompt: a step's clips come in groups of this many consecutive ones, each of one prompt.
    """

    updates_per_rollout: int = 1
    clips_per_prompt: int = 1
    needs_reward_gradient = False
    compares_rollouts = True

    def __repr__(self) -> str:
        """As it is written in Python: config.json holds it, and a run is resumed only with the same estimator."""
        return type(self).__name__

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
            f"reward {lacking[0].name!r} is not differentiable, but this estimator needs its gradient. Evaluate with it: "
            f"held_out_reward=… in a shell, evaluate(…, held_out=[…]) in Python{instead}; "
            f"or train without its gradient: estimator=GRPO"
        )

    def check_settings(self, config) -> None:  # noqa: B027
        """Raises ValueError for invalid settings of a run; sampling is resolved."""

    @abstractmethod
    def collect(self, batch: Batch) -> Collected:
        """Sample a batch, without a graph."""

    def advantages(self, collected: list[Collected], gather: Callable) -> None:  # noqa: B027
        """Between roll-out and gradient: compare rewards; gather(value) lists those of all processes."""

    def minibatch(self, collected: Iterable[Collected], update: int) -> Iterable[Collected]:
        """What one of the updates per roll-out, counted from 0, learns from: a part of each, or all."""
        return collected

    def state(self) -> dict:
        """What is remembered from step to step, for a checkpoint: numbers and texts, in lists and dicts."""
        return {}

    def restore(self, state: dict) -> None:  # noqa: B027
        """Continue from a `state`; called after `setup`."""

    @abstractmethod
    def accumulate(
        self, collected: Collected, weight: float, backward: Callable[[torch.Tensor], None]
    ) -> Row:
        """Add  weight * gradient of a loss  to `.grad` of the adapter's parameters.

        Args:
            weight: 1 / the number of micro-batches.
            backward: runs the backward pass of a scalar.
        """
