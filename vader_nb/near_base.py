"""Staying near the base: a pull of the outputs toward the base's, and a moving average of the weights.

Maximizing a reward alone takes a model away from what videos look like. What holds it back is a penalty on the distance
of the adapter's outputs from the base's at the same latents (DPOK, arXiv 2305.16381; Flow-GRPO, arXiv 2505.05470). The
base is the adapter switched off: nothing more is loaded.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from .gradient import replay
from .lora import Adapter
from .models import VideoModel
from .sampling import Rollout, next_latents, renoise
from .strategies import Plan

ONE_STEP = Plan(frozenset([2]), stop=1)  # a call that learns, and the clean latents predicted there
PROBE = 1e-3  # small, for schedulers that clip


def pull_to_base(
    model: VideoModel,
    adapter: Adapter,
    rollout: Rollout,
    plan: Plan,
    context: Callable[[], contextlib.AbstractContextManager],
    weight: float,
    backward: Callable[[torch.Tensor], None],
) -> torch.Tensor:
    """Add the gradient of  weight * mean(distance)  to `.grad` of the adapter's parameters.

    The distance is that between the adapter's and the base's guided outputs at each step that learns, whose latents
    count as given: the mean squared difference or, where the sampler adds noise, the KL divergence of the two steps;
    both are means over the latents' entries and over the steps.

    Args:
        model, adapter, rollout, plan: as for `gradient.accumulate`.
        context: surrounds each denoiser call with a graph, see `offload.recomputation`.
        weight: of the mean over clips.
        backward: gets a scalar whose gradient is the adapter's.

    Returns:
        The distances (B,).
    """
    steps = list(learning_steps(model, rollout, plan))
    total = torch.zeros(len(rollout.prompts), device=rollout.latents.device)
    for step in steps:
        with adapter.disabled():
            base = predicted(model, step)
        clean = replay(model, step, ONE_STEP, lambda active: context())
        apart = (clean - base).detach().to(torch.promote_types(clean.dtype, torch.float32))
        pull = apart * (distance_factor(model, step) / len(steps) / apart[0].numel())
        with adapter.scaled(2 * pull) as direction:
            backward((clean * direction).sum() * (weight / len(apart)))
        total = total + (pull * apart).flatten(1).sum(1)
    return total


def learning_steps(model: VideoModel, rollout: Rollout, plan: Plan) -> Iterator[Rollout]:
    """The steps that learn, each as a roll-out of one step."""
    if plan.renoise:
        rollout, plan = renoise(model, rollout, plan.stop), ONE_STEP
    scheduler, generators = rollout.at_window()
    for i, (t, state) in enumerate(zip(rollout.timesteps, rollout.states)):
        outputs = rollout.outputs[i]
        if len(rollout.timesteps) - i + plan.stop in plan.active:
            one = replace(rollout, timesteps=[t], states=[state], outputs=[outputs])
            one.scheduler, one.kept, one.known = copy.deepcopy(scheduler), None, None
            yield one
        model.scale_input(scheduler, state, t)
        output = model.combine(outputs, t, rollout.sampling)
        next_latents(model, scheduler, output, t, state, rollout, generators)


@torch.no_grad()
def predicted(model: VideoModel, step: Rollout) -> torch.Tensor:
    """The clean latents that the model predicts at a step."""
    scheduler, t, latents = step.at_window()[0], step.timesteps[0], step.states[0]
    scaled = model.scale_input(scheduler, latents, t)
    output = model.guided(scaled, t, step.conditioning, step.sampling)
    return model.with_given(model.x0(scheduler, output, t, latents), step.conditioning)


def distance_factor(model: VideoModel, step: Rollout) -> float:
    """Factor from squared differences of predicted clean latents to those of outputs, or a noisy step's KL divergence.

    Found by taking the step with different outputs and noise, since each scheduler has its own formula.
    """
    scheduler, t = step.at_window()[0], step.timesteps[0]
    zeros = torch.zeros(1, 1, 1, 1, 1, device=model.device, dtype=torch.float64)
    model.scale_input(scheduler, zeros, t)

    def taken(output: float, seed: int) -> float:
        options = {"eta": step.sampling.eta, "generators": [torch.Generator().manual_seed(seed)]}
        twin = copy.deepcopy(scheduler)
        return model.step(twin, zeros + output, t, zeros, **options).flatten()[0].item()

    def noise(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(1, generator=generator, dtype=torch.float64).item()

    clean = [model.x0(scheduler, zeros + output, t, zeros).item() for output in (0.0, PROBE)]
    slope = (clean[1] - clean[0]) / PROBE
    std = abs(taken(0, 0) - taken(0, 1)) / abs(noise(0) - noise(1))
    if std < 1e-6:
        return slope**-2
    return ((taken(PROBE, 0) - taken(0, 0)) / PROBE / slope / std) ** 2 / 2


class MovingAverage:
    """The exponential moving average of trained tensors over updates. It follows faster at first, as diffusers' does."""

    def __init__(self, parameters: list[torch.nn.Parameter], decay: float):
        self.parameters, self.decay, self.updates = parameters, decay, 0
        self.tensors = [p.detach().clone() for p in parameters]

    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, self.updates / (9 + self.updates))
        for average, p in zip(self.tensors, self.parameters):
            average.lerp_(p.detach(), 1 - decay)

    def apply(self) -> None:
        """The parameters take the average's values."""
        put(self.tensors, self.parameters)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        own = [p.detach().clone() for p in self.parameters]
        self.apply()
        try:
            yield
        finally:
            put(own, self.parameters)

    def state_dict(self) -> dict:
        """The average, and the parameters themselves: a checkpoint's adapter is the average."""
        own = [p.detach().clone() for p in self.parameters]
        return {"updates": self.updates, "average": self.tensors, "own": own}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        put(state["average"], self.tensors)
        put(state["own"], self.parameters)


@torch.no_grad()
def put(values: list[torch.Tensor], tensors: list) -> None:
    for tensor, value in zip(tensors, values):
        tensor.copy_(value)
