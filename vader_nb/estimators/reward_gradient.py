"""The reward's own gradient, backpropagated through the last denoising steps."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from .. import experts, gradient
from ..near_base import pull_to_base
from ..offload import recomputation
from ..rewards import record_parts
from ..sampling import Rollout
from ..strategies import Frames, Plan, Strategy
from .base import Batch, Collected, Estimator, Row


class RewardGradient(Estimator):
    """The reward's own gradient, backpropagated through the last denoising steps: VADER, DRaFT, ReFL, …

    With `rollout_reuse=n` a roll-out serves n updates. Each begins at the latents before the steps that learn, which
    the adapter made up to n - 1 updates ago; from there on it is on-policy: those steps are taken again with
    the current adapter, new frames are drawn, and so is the noise of `DRaFTLV` and of stochastic samplers.

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
        self.updates_per_rollout, self.base_penalty = config.rollout_reuse, config.base_penalty
        names = ("decode_chunk_size", "activation_offload", "gradient_checkpointing")
        self.settings = {name: getattr(config, name) for name in names}

    def collect(self, batch: Batch) -> Collected:
        of = self.model, self.adapter, self.sampling
        plan = experts.draw_plan(*of, self.strategy, batch.generator)
        frames = self.chosen_frames(batch.prompts, batch.generator)
        rollout = self.rolled_out(batch.prompts, batch.seeds, plan)
        return Collected(rollout, plan, frames, batch.generator)

    def chosen_frames(self, prompts, generator: torch.Generator | None) -> list[int]:
        """Indices; given frames are not drawn."""
        count = self.sampling.num_frames
        return self.frames.choose(count, generator, self.model.given_frames(prompts))

    def rolled_out(self, prompts, seeds, plan: Plan, start: Rollout | None = None) -> Rollout:
        of = self.model, self.adapter, prompts, seeds, self.sampling, plan
        return gradient.rolled_out(*of, start, **self.settings)

    def minibatch(self, collected: Iterable[Collected], update: int) -> Iterable[Collected]:
        """The roll-outs, and for later updates their windows once more; one at a time, as they are needed."""
        if update:
            return map(self.renewed, self.reused)
        self.reused: list[Collected] = []
        return map(self.remembered, collected) if self.updates_per_rollout > 1 else collected

    def remembered(self, collected: Collected) -> Collected:
        self.reused.append(collected)
        return collected

    def renewed(self, collected: Collected) -> Collected:
        """The same latents before the steps that learn, for the next update."""
        rollout, plan, generator = collected.rollout, collected.plan, collected.generator
        frames = self.chosen_frames(rollout.prompts, generator)
        if not plan.renoise:  # which takes those steps itself
            rollout = self.rolled_out(rollout.prompts, [], plan, rollout)
        return replace(collected, rollout=rollout, frames=frames)

    def accumulate(self, collected, weight, backward) -> Row:
        info: dict = {"frames": collected.frames}
        if self.base_penalty:
            rollout = self.model, self.adapter, collected.rollout, collected.plan
            how = [self.settings[name] for name in ("gradient_checkpointing", "activation_offload")]
            context = recomputation(self.model, *how)
            distance = pull_to_base(*rollout, context, weight * self.base_penalty, backward)
            info["base_distance"] = distance.mean().item()
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
        return Row(result.rewards, parts, info)
