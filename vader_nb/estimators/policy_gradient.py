"""Denoising as a decision process: each step a Gaussian action, rewarded by what the clip scores (DDPO, GRPO).

Maximizes  E[ sum over steps of A * p(x' | x) / p_old(x' | x) ]  with the ratio clipped as in PPO (arXiv 1707.06347),
where A, the advantage, says how much better a clip was than others. No gradient goes through the decoder, the reward,
or from one step to another: memory is one denoiser call's.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import experts
from ..sampling import roll_out
from ..transitions import transition
from .base import Batch, Row
from .from_scores import FromScores, Scored


@dataclass
class PolicyGradient(FromScores):
    """Base class: subclasses give the advantages.

    Guidance is part of the policy, as in the papers' code: the roll-out's and the gradient's output is the guided one.

    Args:
        clip_range: how far the ratio may move from 1 for its gradient to count. Log-probabilities are means over
            latent entries, by which the papers' ranges are published.
        adv_clip: advantages are clipped to ± this.
        noise_level: of the roll-outs: DDIM's eta (default: the settings', or 1 where it is 0), or of a flow
            Flow-GRPO's a (default: 0.7).
        timestep_fraction: the fraction of the steps that learns, drawn for each micro-batch.
        num_inference_steps: of the roll-outs, at most (denoising reduction); None: the settings'.
        beta: weight of the KL to the model without the adapter.
        reward_weights: weights of the advantages of a mixed reward's parts, by name: each part is compared by itself,
            so that its scale does not matter (DanceGRPO's several rewards). Default: the mixed reward is compared.
    """

    clip_range: float = 1e-4
    adv_clip: float = 5.0
    noise_level: float | None = None
    timestep_fraction: float = 1.0
    num_inference_steps: int | None = None
    beta: float = 0.0
    reward_weights: dict[str, float] | None = None

    def setup(self, model, adapter, reward, config) -> None:
        super().setup(model, adapter, reward, config)
        names = [part.name for part in reward.parts()] if reward.children else ["none"]
        if unknown := sorted(set(self.reward_weights or ()) - set(names)):
            raise ValueError(
                f"reward_weights names {unknown[0]!r}; the reward's parts are {', '.join(names)}"
            )
        if self.num_inference_steps is not None:
            steps = min(self.num_inference_steps, self.sampling.num_inference_steps)
            self.sampling = replace(self.sampling, num_inference_steps=steps)
        owners = list(reversed(experts.by_step(model, self.sampling)))
        of = model, self.sampling
        self.moves = [transition(*of, i, self.noise_level) for i in range(len(owners))]
        # A step without noise has no density; one whose denoiser has no part of the adapter does not learn.
        self.usable = [
            i for i, m in enumerate(self.moves) if m.std and owners[i] in adapter.denoisers
        ]
        if not self.usable:
            raise ValueError(
                f"none of the {len(owners)} steps has both noise and an adapter to train: raise num_inference_steps"
            )

    def take(self, i: int, output, latents, generators) -> torch.Tensor:
        return self.moves[i].sample(output, latents, generators)

    def collect(self, batch: Batch) -> Scored:
        steps = self.model.num_steps(self.sampling)
        of = self.model, batch.prompts, batch.seeds, self.sampling
        rollout = roll_out(*of, adapter=self.adapter, window=steps, step=self.take)
        count = max(1, round(self.timestep_fraction * len(self.usable)))
        drawn = torch.randperm(len(self.usable), generator=batch.generator)[:count].tolist()
        chosen = sorted(self.usable[k] for k in drawn)
        states = [*rollout.states, rollout.latents]
        log_probs = []
        for i in chosen:
            output = self.model.combine(rollout.outputs[i], rollout.timesteps[i], self.sampling)
            log_probs.append(self.log_prob(i, output, states)[0])
        rollout.outputs.clear()
        return replace(self.scored(rollout, batch), steps=chosen, log_probs=log_probs)

    def log_prob(self, i: int, output: torch.Tensor, states: list) -> tuple:
        """Log-probability (B,) of what step i did, and its mean, by the guided output."""
        move = self.moves[i]
        mean = move.mean(output, states[i])
        return move.log_prob(mean, states[i + 1]), mean

    def compare(self, prompts: list[str], rewards: torch.Tensor) -> torch.Tensor:
        """Advantages (N,) from the rewards, in float64, of all the step's clips in all processes, in order."""
        raise NotImplementedError

    def advantages(self, collected: list[Scored], gather: Callable) -> None:
        own = {}
        for one in collected:
            texts = [str(prompt) for prompt in one.batch.prompts]
            own[one.batch.index] = texts, self.compared(one)
        everyone = {index: entry for part in gather(own) for index, entry in part.items()}
        order = sorted(everyone)
        texts = [text for index in order for text in everyone[index][0]]
        scores = torch.cat([everyone[index][1] for index in order], dim=1)
        values = torch.zeros_like(scores[0])
        # Where one is not finite, the step will be skipped: nothing is to be remembered of it.
        if scores.isfinite().all():
            weights = self.reward_weights or {"": 1.0}
            for (name, weight), rewards in zip(weights.items(), scores):
                values += weight * self.compare([name + text for text in texts], rewards)
        parts = dict(zip(order, values.split([everyone[index][1].shape[1] for index in order])))
        for one in collected:
            one.advantages = parts[one.batch.index].to(one.rewards)

    def compared(self, scored: Scored) -> torch.Tensor:
        """What is compared of a micro-batch, (parts, B), in float64 on the CPU."""
        rewards: list[Any] = [scored.rewards] * len(self.reward_weights or [None])
        if self.reward_weights and not scored.problem:
            rewards = [scored.parts[name] for name in self.reward_weights]
        return torch.stack(rewards).double().cpu()

    def accumulate(
        self, collected: Scored, weight: float, backward: Callable[[torch.Tensor], None]
    ) -> Row:
        rollout, model = collected.rollout, self.model
        states = [*rollout.states, rollout.latents]
        learning = model.learning_branches(self.sampling)
        fixed = tuple(name for name in model.branches(self.sampling) if name not in learning)
        seen = []
        for i, before in zip(collected.steps, collected.log_probs):
            t, scheduler = rollout.timesteps[i], model.new_scheduler(self.sampling)
            reference = self.reference(i, rollout) if self.beta else None

            def loss(outputs, i=i, t=t, before=before, reference=reference):
                log_prob, mean = self.log_prob(i, model.combine(outputs, t, self.sampling), states)
                value = self.objective((log_prob - before).exp(), collected.advantages, seen)
                if reference is not None:
                    value = value + self.beta * self.moves[i].divergence(mean, reference).mean()
                return value * (weight / len(collected.steps))

            call = rollout.conditioning, states[i], t, scheduler
            self.learn(*call, learning, loss, backward, fixed)
        return self.row(collected, {"clip_fraction": sum(seen) / len(seen)})

    def objective(self, ratio: torch.Tensor, advantages: torch.Tensor, seen: list) -> torch.Tensor:
        """PPO's clipped loss, of ratios (B,)."""
        advantages = advantages.clamp(-self.adv_clip, self.adv_clip).to(ratio)
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        seen.append((ratio != clipped).float().mean().item())
        return -torch.minimum(ratio * advantages, clipped * advantages).mean()

    @torch.no_grad()
    def reference(self, i: int, rollout) -> torch.Tensor:
        """The mean of step i without the adapter."""
        t, state = rollout.timesteps[i], rollout.states[i]
        scaled = self.model.scale_input(self.model.new_scheduler(self.sampling), state, t)
        with self.adapter.disabled():
            output = self.model.guided(scaled, t, rollout.conditioning, self.sampling)
        return self.moves[i].mean(output, state)
