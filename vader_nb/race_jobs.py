"""The jobs of a race, and what is wrong with its settings."""

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .evaluation import BASE
from .meter import COSTS
from .train_config import TrainConfig

# What the race decides, not a contestant.
DECIDED = {"steps", "learning_rate", "seed", "output_dir", "resume", "validation_steps"}
DECIDED |= {"early_stopping", "extend", "segments", "log_with", "progress"}
DECIDED |= {"checkpoints_total_limit"}
SETTINGS = {f.name for f in TrainConfig.flat_fields()} - DECIDED
# A contestant's own settings, besides SETTINGS.
OWN = {"estimator", "reward", "learning_rates", "best_of", "guidance"}


@dataclass(frozen=True)
class Job:
    """One run: a contestant, and where it trains a learning rate and a seed."""

    contestant: str
    settings: Mapping[str, Any]
    learning_rate: float | None = None
    seed: int | None = None

    @property
    def folder(self) -> str:
        name = re.sub(r"\W+", "-", self.contestant).strip("-").lower()
        return name if self.seed is None else f"{name}-{self.learning_rate:g}-{self.seed}"


def plan_jobs(contestants, settings, learning_rates, seeds) -> list[Job]:
    """All jobs of a race, in order. Raises ValueError, with the name, for an invalid contestant."""
    jobs, grids = [Job(BASE, settings)], {}
    check_names(settings, SETTINGS, "")
    for name, own in contestants.items():
        where = f" of contestant {name!r}"
        if not isinstance(own, Mapping):
            raise ValueError(f"contestants.{name} must be a mapping of settings, got {own!r}")
        check_names(own, SETTINGS | OWN, where)
        rates = own.get("learning_rates", learning_rates)
        untrained = {"best_of", "guidance"} & own.keys()
        if untrained and len(own) > 1:
            other = min(own.keys() - {min(untrained)})
            raise ValueError(f"{other}{where} has no effect: {min(untrained)} trains nothing")
        own = {key: value for key, value in own.items() if key != "learning_rates"}
        if untrained:
            jobs.append(Job(name, own))
            continue
        grids[name] = rates
        if not isinstance(rates, Sequence) or not all(isinstance(r, float | int) for r in rates):
            raise ValueError(f"learning_rates{where} must be a list of numbers, got {rates!r}")
        jobs += [Job(name, {**settings, **own}, rate, seed) for rate in rates for seed in seeds]
    if len({len(rates) for rates in grids.values()}) > 1:
        counts = ", ".join(f"{name} {len(rates)}" for name, rates in grids.items())
        raise ValueError(
            f"learning_rates: every contestant must be tuned on the same number of rates, got {counts}"
        )
    twice = [name for name, count in Counter(job.folder for job in jobs).items() if count > 1]
    if twice:
        raise ValueError(
            f"contestants, learning_rates or seeds repeat: two jobs are named {twice[0]!r}"
        )
    return jobs


def check_names(given: Mapping, known: set[str], where: str) -> None:
    for key in given.keys() - known:
        near = difflib.get_close_matches(str(key), known, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(sorted(known))}"
        hint = "the race decides it" if key in DECIDED else hint
        raise ValueError(f"unknown setting {key!r}{where}: {hint}")


def checked_budget(budget: Mapping[str, float], evaluations: int) -> tuple[str, float]:
    units = [name for name in COSTS if name not in ("denoiser_backwards", "bytes_kept")]
    if len(budget) != 1 or not budget.keys() <= set(units):
        raise ValueError(f"budget must be one of {', '.join(units)}, with a number, got {budget}")
    ((unit, limit),) = budget.items()
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0:
        raise ValueError(f"budget.{unit} must be a number above 0, got {limit!r}")
    if evaluations < 1:
        raise ValueError(f"evaluations must be at least 1, got {evaluations}")
    return unit, limit
