"""Recipes: per family and GPU a configuration for `vader-nb align config=NAME`, and how far it is known to work.

The configurations are `configs/NAME.yaml`. Learning rates, ranks and numbers of steps are those of published runs,
or left out. `configs/recipes/cards.yaml` has what is known of each, `runs.yaml` what `make recipes` measured.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
import yaml

from . import config, models
from .sampling import Sampling
from .strategies import parse_strategy
from .tables import Table

FOLDER = config.FOLDER / "recipes"
HEADINGS = ("recipe", "GPUs", "memory of each", "denoiser calls", "rate, rank, steps", "status")
SLURM = "slurm"  # the script beside the recipes


@dataclass(frozen=True)
class Run:
    """What `make recipes` measured: rows of `evaluation.json`, seconds of training, and each step's mean reward."""

    date: str
    commit: str
    seconds: int
    machine: str
    rows: list[dict]
    rewards: list[float]

    def __str__(self) -> str:
        found = [
            f"{row['metric']}{' †' if row['held_out'] else ''} {row['base']:.3f} to {row['adapter']:.3f}, "
            f"difference {row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"
            for row in self.rows
        ]
        where = f"on {self.rows[0]['prompts']} {self.rows[0]['group']} prompts"
        return (
            f"run here: {self.date}, commit {self.commit}, trained in {self.seconds} s on {self.machine}; "
            f"{where}: {'; '.join(found)}"
        )


@dataclass(frozen=True)
class Card:
    """What is known of a recipe.

    Attributes:
        gpu: a name of `memory_planner.GPUS`, or CPU.
        memory: GiB at the peak of a step on one GPU, by `simulated`.
        gpus: how many.
        run_by: who trained with these settings, with their figures.
        source: where they say so.
        differs: how this differs from what they did.
    """

    name: str
    gpu: str
    memory: float
    gpus: int = 1
    run_by: str = ""
    source: str = ""
    differs: str = ""

    @property
    def settings(self) -> dict:
        return config.translate.read_yaml(config.FOLDER / f"{self.name}.yaml")

    @property
    def memory_words(self) -> list[str]:
        """Arguments of `vader-nb memory` for a step of this recipe."""
        on_cpu = ["dtype=float32", "gradient_checkpointing=false"]  # its defaults
        return [f"config={self.name}", *(on_cpu if self.gpu == "CPU" else [])]

    @property
    def status(self) -> str:
        if self.name in RUNS:
            return str(RUNS[self.name])
        if self.gpu == "CPU":
            return "not run yet: make recipes"
        if not self.run_by:
            return "simulated only"
        differs = f"; {self.differs}" if self.differs else ""
        return f"run by {self.run_by}{differs} ({self.source}); not run here"

    @property
    def calls(self) -> int:
        """Forward passes of the denoiser per optimizer step, one per clip and guidance branch.

        All steps are taken without a graph, and those that learn are taken again with one; the last one's
        graph may be kept (`offload.kept_call`). Recomputed blocks are not counted.
        """
        given = self.settings
        family: Any = models.family_of(models.checkpoint_of(given["model"]))
        options = family.sampling_options | given.get("options", {})
        sampling = Sampling(guidance_scale=given["guidance_scale"], options=options)
        branches = len(family.branches(None, sampling))
        learning = branches if given.get("unconditional_gradient", True) else 1
        steps = given["num_inference_steps"]
        plan = parse_strategy(given["strategy"]).plan(steps, torch.Generator().manual_seed(0))
        again = learning * (len(plan.active) if plan.linear else max(plan.active) - plan.stop)
        if plan.renoise:
            again = plan.renoise * (branches + learning)
        elif 1 + plan.stop in plan.active and not plan.linear and learning == branches:
            moving = ("model_cpu_offload", "activation_offload", "sequential_guidance")
            stays = family.independent_frames and not any(given.get(key) for key in moving)
            again -= branches * (stays and self.gpu != "CPU")
        clips = self.gpus * given["batch_size"] * given.get("gradient_accumulation_steps", 1)
        return clips * (branches * (steps - plan.stop) + again)

    def row(self) -> tuple[str, ...]:
        """The cells under `HEADINGS`."""
        given, on_cpu = self.settings, self.gpu == "CPU"
        published = [given.get(key) for key in ("learning_rate", "rank", "steps")]
        return (
            self.name,
            self.gpu if on_cpu else f"{self.gpus} × {self.gpu}",
            f"{self.memory:.1f} GiB",
            str(self.calls),
            ", ".join("not published" if x is None else f"{x:g}" for x in published),
            self.status,
        )


def _read(name: str) -> dict:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")) or {}


CARDS = {name: Card(name, **fields) for name, fields in _read("cards").items()}
RUNS = {name: Run(**fields) for name, fields in _read("runs").items()}


def table() -> Table:
    """All recipes: hardware, simulated memory, denoiser calls per optimizer step, and who ran them."""
    return Table(HEADINGS, [card.row() for card in CARDS.values()], HEADINGS)


def text(name: str) -> str:
    """A recipe's YAML, or with "slurm" the script that runs one on a cluster and is requeued.

    Raises:
        ValueError: for an unknown name.
    """
    places = {card: config.FOLDER / f"{card}.yaml" for card in CARDS}
    places[SLURM] = FOLDER / "slurm.sh"
    if name not in places:
        raise ValueError(f"unknown recipe {name!r}; choose one of {', '.join(places)}")
    return places[name].read_text(encoding="utf-8")


def simulated(name: str) -> float:
    """GiB at the peak of a step of a recipe on one GPU; takes some seconds to minutes.

    It is what `vader-nb memory` prints for `Card.memory_words`.
    """
    from .memory_planner import GIB, simulate

    given = vars(config.read(config.Memory, CARDS[name].memory_words))
    asked = {f.name for f in fields(config.Common)} | {"gpu_memory", "measured"}
    settings = {key: value for key, value in given.items() if key not in asked}
    return max(simulate(**settings).values()) / GIB
