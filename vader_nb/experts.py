"""Models with several denoisers, each for a part of the chain: which of them a strategy's steps reach.

Wan 2.2 A14B has an expert for high noise (`transformer`) and one for low noise (`transformer_2`). Of 40 steps with
flow_shift=3 the latter takes the last 27, so `Last(1)` teaches it alone. An adapter on the other one would only waste
memory and disk space: it gets none, and a warning says so.

Steps are counted from the end: step 1 is the last one.
"""

import warnings
from collections.abc import Collection
from dataclasses import replace

import torch

from .lora import ATTENTION, Adapter
from .models import VideoModel
from .strategies import Plan, Strategy

DRAWS = 2000  # plans that tell which steps a strategy may choose


def by_step(model: VideoModel, sampling) -> list[str]:
    """The key of the denoiser of each step, the last step's first."""
    keys = {id(denoiser): key for key, denoiser in model.denoisers.items()}
    timesteps = model.new_scheduler(sampling).timesteps
    return [keys[id(model.denoiser_at(t))] for t in reversed(list(timesteps))]


def draw_plan(model: VideoModel, adapter: Adapter, sampling, strategy: Strategy, generator) -> Plan:
    """A plan, restricted to the steps whose denoiser has a part of the adapter.

    Raises:
        ValueError: if there is none, or the strategy does not fit the chain.
    """
    plan = strategy.plan(model.num_steps(sampling), generator)
    if len(adapter.denoisers) == len(model.denoisers):
        return plan
    steps = by_step(model, sampling)
    active = frozenset(i for i in plan.active if steps[i - 1] in adapter.denoisers)
    if not active:
        Reach(model, sampling, strategy).check(adapter.denoisers)
    return replace(plan, active=active)


class Reach:
    """Which denoisers a strategy teaches.

    Attributes:
        draws: the keys of the denoisers whose steps learn, for every plan that the strategy may draw.
        learning: those of any draw, in the model's order.
    """

    def __init__(self, model: VideoModel, sampling, strategy: Strategy | None):
        """sampling: resolved. strategy: None where every step may learn."""
        self.model, self.sampling, self.strategy = model, sampling, strategy
        self.draws = [set(model.denoisers)]
        if strategy is not None and len(model.denoisers) > 1:
            steps, generator = by_step(model, sampling), torch.Generator().manual_seed(0)
            plans = {strategy.plan(len(steps), generator) for _ in range(DRAWS)}
            self.draws = [{steps[i - 1] for i in plan.active} for plan in plans]
        self.learning = [key for key in model.denoisers if any(key in draw for draw in self.draws)]

    def __str__(self) -> str:
        """Which denoiser has which steps, and how to teach one that is not reached."""
        steps = by_step(self.model, self.sampling)
        places = {key: [i + 1 for i, own in enumerate(steps) if own == key] for key in steps}
        parts = [f"{key} has steps {min(own)} to {max(own)}" for key, own in places.items()]
        text = f"counted from the end, {' and '.join(parts)}; {self.strategy} reaches {' and '.join(self.learning)}"
        ways = [f"Step({min(own)})" for key, own in places.items() if key not in self.learning]
        return (
            f"{text} alone. strategy={' or '.join(ways)} trains the other, DRTune(3) both"
            if ways
            else text
        )

    def targets(self, targets: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """The targets (for `lora.add`) of an adapter in the denoisers that learn. Warns of one that gets none.

        Raises:
            ValueError: for layers of a denoiser that never learns, or if some draws would teach nothing.
        """
        wanted, keys = targets or (ATTENTION,), list(self.model.denoisers)
        keyed = {target: key for target in wanted for key in keys if target.startswith(f"{key}.")}
        for target, key in keyed.items():
            if key not in self.learning:
                raise ValueError(f"targets={target!r} would never learn: {self}")
        self.check(self.learning if len(keyed) < len(wanted) else keyed.values())
        if self.learning == keys or len(keyed) == len(wanted):
            return targets
        names = " and ".join(self.learning)
        warnings.warn(f"{self.model.name!r} gets an adapter in {names} alone: {self}", stacklevel=4)
        groups = [[t] if t in keyed else [f"{k}.{t}" for k in self.learning] for t in wanted]
        return tuple(target for group in groups for target in group)

    def trained(self, adapter: Adapter) -> list[str]:
        """The denoisers whose part of an adapter is trained. Warns of a part that is not.

        Raises:
            ValueError: if some draws would teach nothing.
        """
        self.check(adapter.denoisers)
        if idle := [key for key in adapter.denoisers if key not in self.learning]:
            names = " and ".join(idle)
            warnings.warn(f"the adapter's part in {names} stays as it is: {self}", stacklevel=4)
        return [key for key in adapter.denoisers if key in self.learning]

    def check(self, keys: Collection[str]) -> None:
        """Raise ValueError if some draws have no step of these denoisers."""
        if not all(draw & set(keys) for draw in self.draws):
            names = " and ".join(dict.fromkeys(keys))
            raise ValueError(f"some draws train nothing, with an adapter in {names} alone: {self}")
