"""What estimators without a gradient of the reward share: scores of whole clips, and one denoiser call at a time.

The reward may be anything that gives a number: the bytes of a file, a server's answer.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..models import Conditioning
from ..offload import recomputation
from ..rewards import record_parts
from ..sampling import NonFiniteError, Rollout, check_bounds, decode, finite
from ..strategies import Plan
from ..transitions import widened
from .base import Batch, Collected, Estimator, Row

BOUNDS = {
    "minibatches": (1, 1000),
    "inner_epochs": (1, 1000),
    "clip_range": (0, 1),
    "adv_clip": (0, 1e6),
    "noise_level": (1e-3, 10),
    "timestep_fraction": (1e-3, 1),
    "num_inference_steps": (1, 1000),
    "beta": (0, 1e9),
    "buffer_size": (1, 10**6),
    "min_count": (1, 10**6),
    "group_size": (2, 10**6),
    "draws": (1, 1000),
}
Loss = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]  # of the denoiser's outputs, by branch


@dataclass
class Scored(Collected):
    """A roll-out with its rewards.

    Attributes:
        batch: what was sampled; its generator goes on to draw.
        parts: (B,) for every part of a mixed reward, by its name.
        problem: a number that was not finite; raised when all processes can know of it.
        steps, log_probs: indices of the chain's steps that learn, and log-probabilities (B,) of what they did.
    """

    rewards: Any = None
    advantages: Any = None
    batch: Any = None
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    problem: NonFiniteError | None = None
    steps: list[int] = field(default_factory=list)
    log_probs: list[torch.Tensor] = field(default_factory=list)

    def take(self, clips: Sequence[int]) -> "Scored":
        """The clips of these indices."""
        rollout, clips = self.rollout, list(clips)
        branches = {
            name: {key: value[clips] for key, value in inputs.items()}
            for name, inputs in rollout.conditioning.branches.items()
        }
        rollout = replace(
            rollout,
            prompts=[rollout.prompts[i] for i in clips],
            conditioning=Conditioning(branches),
            latents=rollout.latents[clips],
            states=[state[clips] for state in rollout.states],
        )
        return replace(
            self,
            rollout=rollout,
            rewards=self.rewards[clips],
            advantages=None if self.advantages is None else self.advantages[clips],
            parts={name: values[clips] for name, values in self.parts.items()},
            log_probs=[values[clips] for values in self.log_probs],
        )


@dataclass
class FromScores(Estimator):
    """Base class. All clips of a step are scored, and compared, before anything is learned from them.

    Args:
        minibatches: updates in which each clip is used once; each takes a part of every micro-batch.
        inner_epochs: times that each clip is used.
    """

    minibatches: int = 1
    inner_epochs: int = 1

    @property
    def updates_per_rollout(self) -> int:
        return self.minibatches * self.inner_epochs

    def check_settings(self, config) -> None:
        name = type(self).__name__
        check_bounds(self, {key: BOUNDS[key] for key in vars(self).keys() & BOUNDS.keys()})
        if config.sampling.extend > 1:
            raise ValueError(f"{name} learns from clips of one segment: leave extend out")
        if config.strategy != type(config)().strategy:
            raise ValueError(
                f"strategy={config.strategy} chooses the steps of a reward's gradient; {name} uses none: leave it out"
            )
        if config.batch_size % self.minibatches:
            raise ValueError(
                f"batch_size={config.batch_size} must be a multiple of minibatches={self.minibatches}"
            )

    def setup(self, model, adapter, reward, config) -> None:
        super().setup(model, adapter, reward, config)
        self.frames, self.decode_chunk_size = config.frames, config.decode_chunk_size
        self.options = config.gradient_checkpointing, config.activation_offload

    def minibatch(self, collected: Iterable[Scored], update: int) -> list[Scored]:
        first = update % self.minibatches
        return [one.take(range(first, len(one.rewards), self.minibatches)) for one in collected]

    @torch.no_grad()
    def scored(self, rollout: Rollout, batch: Batch) -> Scored:
        """The roll-out with its rewards."""
        model, reward, count = self.model, self.reward, self.sampling.num_frames
        frames = self.frames.choose(count, batch.generator, model.given_frames(batch.prompts))
        result = Scored(rollout, Plan(frozenset()), frames, batch=batch)
        size = self.decode_chunk_size if model.independent_frames else count
        chunks = [frames[i : i + size] for i in range(0, len(frames), size)]
        model.onload(*model.decoders(), *reward.networks)
        try:
            rollout.check()
            clips = torch.cat([decode(model, rollout.latents, chunk) for chunk in chunks], dim=1)
            with record_parts() as scores:
                rewards = reward(clips, [str(prompt) for prompt in batch.prompts])
            if not isinstance(rewards, torch.Tensor) or rewards.shape != (len(clips),):
                got = getattr(rewards, "shape", type(rewards).__name__)
                raise TypeError(
                    f"reward {reward.name!r} must return shape ({len(clips)},), got {got}"
                )
            result.rewards = finite(rewards, f"rewards of {reward.name!r}")
            result.parts = {name: torch.cat(x, dim=1).mean(dim=1) for name, x in scores.items()}
        except NonFiniteError as error:  # raised when all processes are there to hear it
            result.problem = error
            result.rewards = torch.full((len(batch.prompts),), torch.nan)
        return result

    def learn(
        self,
        conditioning: Conditioning,
        latents: torch.Tensor,
        t: torch.Tensor,
        scheduler,
        learning: list[str],
        loss: Loss,
        backward: Callable,
        fixed: tuple[str, ...] = (),
    ) -> None:
        """Add the gradient of a loss of one denoiser call to `.grad` of the adapter's parameters.

        The loss's gradient on the outputs is taken first, so that it can be scaled for float16, and so that with
        `sequential_guidance` one branch's graph is in memory at a time.

        Args:
            latents, t, scheduler: the call's, before the scheduler scales them.
            learning, fixed: branches with, and without, a gradient.
        """
        model, context = self.model, recomputation(self.model, *self.options)
        scaled = model.scale_input(scheduler, latents, t)

        def call(names) -> dict[str, torch.Tensor]:
            with context():
                return model.predict_branches(scaled, t, conditioning, list(names))

        alone = self.sampling.sequential_guidance and len(learning) > 1
        groups = [[name] for name in learning] if alone else [learning]
        with torch.no_grad():
            outputs = call(fixed) if fixed else {}
            for names in groups if alone else []:
                outputs |= call(names)
        made = {} if alone else call(learning)
        leaves = {n: widened((outputs | made)[n]).detach().requires_grad_() for n in learning}
        gradients = torch.autograd.grad(loss(outputs | leaves), list(leaves.values()))
        with self.adapter.scaled(torch.stack(gradients)) as directions:
            pulls = dict(zip(learning, directions))
            for names in groups:
                made = made or call(names)
                backward(sum((widened(made[n]) * pulls[n]).sum() for n in names))
                made = {}

    def row(self, collected: Scored, info: dict) -> Row:
        """What `accumulate` returns. Raises what was not finite."""
        if collected.problem:
            raise collected.problem
        return Row(collected.rewards, collected.parts, info)
