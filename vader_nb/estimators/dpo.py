"""Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908), online: the clips are the model's own, ranked by the reward."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..lora import Adapter
from ..models import VideoModel
from ..models.base import is_flow
from ..sampling import roll_out
from ..transitions import levels, widened
from .base import Batch, Row
from .from_scores import FromScores, Scored


@dataclass
class DPO(FromScores):
    """The best of each prompt's clips is preferred to the worst.

    Equation 14: both get the same noise, at one of the training timesteps, and the denoiser should get better at the
    preferred one, compared with itself without the adapter. Its error is that of what it predicts: the noise, v, or a
    flow's velocity (Flow-DPO, arXiv 2501.13918, with constant beta). Without guidance, as in training. Sampling is
    the model's own, without added noise. beta = 5000 is the paper's; errors are means over latent entries.

    Args:
        group_size: clips of each prompt, two or more; it divides the batch size.
        beta: how strongly the adapter is held to the base.
        draws: timesteps for each pair and update.
    """

    group_size: int = 2
    beta: float = 5000.0
    draws: int = 1

    @property
    def clips_per_prompt(self) -> int:
        return self.group_size

    def check_settings(self, config) -> None:
        super().check_settings(config)
        size = self.group_size * self.minibatches
        if config.batch_size % size:
            raise ValueError(
                f"batch_size={config.batch_size} must be a multiple of group_size={self.group_size} times "
                f"minibatches={self.minibatches}: a pair is ranked within a batch"
            )

    def setup(self, model, adapter, reward, config) -> None:
        super().setup(model, adapter, reward, config)
        if "FlowMap" in type(model.scheduler).__name__:
            raise ValueError(
                f"{model.name!r} predicts whole steps: it has no error at one timestep, which DPO needs"
            )

    def collect(self, batch: Batch) -> Scored:
        of = self.model, batch.prompts, batch.seeds, self.sampling
        return self.scored(roll_out(*of, adapter=self.adapter), batch)

    def minibatch(self, collected, update: int) -> list[Scored]:
        """Pairs: the best and the worst clip of each group, one after the other, what they scored as advantages."""
        result = []
        for one in collected:
            groups = one.rewards.cpu().view(-1, self.group_size)
            ends = torch.stack([groups.argmax(1), groups.argmin(1)], dim=1)
            ends = ends + self.group_size * torch.arange(len(groups))[:, None]
            pairs = ends[update % self.minibatches :: self.minibatches]
            pair = one.take(pairs.flatten().tolist())
            everyone = {"rewards": one.rewards, "parts": one.parts}  # for the record
            result.append(replace(pair, advantages=pair.rewards, **everyone))
        return result

    def accumulate(
        self, collected: Scored, weight: float, backward: Callable[[torch.Tensor], None]
    ) -> Row:
        count, margins = len(collected.advantages) // 2, []
        for k in range(count):
            pair = collected.take([2 * k, 2 * k + 1])
            for _ in range(self.draws):
                self.prefer(pair, weight / (count * self.draws), backward, margins)
        return self.row(collected, {"preferred": sum(m > 0 for m in margins) / len(margins)})

    def prefer(self, pair: Scored, weight: float, backward: Callable, margins: list) -> None:
        """Add the gradient of one pair at one timestep; a tie has none."""
        model, branch = self.model, self.model.branches(self.sampling)[-1]
        generator, clean = pair.batch.generator, widened(pair.rollout.latents)
        scheduler, t = training_timestep(self.adapter, self.sampling, generator)
        alpha, sigma = levels(model, scheduler, t)
        noise = randn_tensor(clean[:1].shape, generator, clean.device, clean.dtype).expand_as(clean)
        latents = (alpha * clean + sigma * noise).to(pair.rollout.latents.dtype)
        wanted = target(model, scheduler, clean, noise, alpha, sigma)
        call = pair.rollout.conditioning, latents, t, scheduler

        def error(outputs) -> torch.Tensor:
            return ((widened(outputs[branch]) - wanted) ** 2).mean(dim=(1, 2, 3, 4))

        with torch.no_grad(), self.adapter.disabled():
            scaled = model.scale_input(scheduler, latents, t)
            reference = error(model.predict_branches(scaled, t, call[0], [branch]))
        tied = bool(pair.advantages[0] == pair.advantages[1])

        def loss(outputs) -> torch.Tensor:
            gained = reference - error(outputs)
            margin = self.beta / 2 * (gained[0] - gained[1])
            margins.append(margin.item())
            return -torch.nn.functional.logsigmoid(margin) * (0 if tied else weight)

        self.learn(*call, [branch], loss, backward)


def training_timestep(adapter: Adapter, sampling, generator: torch.Generator):
    """A random training timestep whose denoiser learns, and a scheduler for it."""
    model = adapter.model
    count = model.scheduler.config.num_train_timesteps
    scheduler = model.new_scheduler(replace(sampling, num_inference_steps=count))
    learning = [model.denoisers[key] for key in adapter.denoisers]
    while True:
        drawn = int(torch.randint(count, (), generator=generator))
        listed = hasattr(scheduler, "sigmas")
        t = scheduler.timesteps[drawn] if listed else torch.tensor(drawn, device=model.device)
        if model.denoiser_at(t) in learning:
            return scheduler, t


def target(model: VideoModel, scheduler, clean, noise, alpha: float, sigma: float) -> torch.Tensor:
    """What the denoiser should predict."""
    if is_flow(scheduler):
        return noise - clean
    prediction = scheduler.config.get("prediction_type", "v_prediction")
    if prediction == "v_prediction":
        size = (alpha**2 + sigma**2) ** 0.5  # 1, or variance exploding
        return (alpha * noise - sigma * clean) / size
    return noise if prediction == "epsilon" else clean
