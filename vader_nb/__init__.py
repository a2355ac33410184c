"""vader_nb: align video diffusion models to differentiable rewards (VADER, arXiv 2407.08737).

    import vader_nb
    model = vader_nb.load("tiny")
    run = vader_nb.align(model, vader_nb.rewards.hps("tiny"), "tiny")

Names are imported on first use: `import vader_nb` itself loads nothing heavy.
"""

import importlib
import logging
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# If it is installed, peft and diffusers import it, and it advises installing a kernel that nothing here calls.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from . import (
        distributed,
        estimators,
        gradient,
        lora,
        models,
        prompts,
        publish,
        recipes,
        rewards,
        sampling,
        speed,
        strategies,
        trainer,
        video,
        zoo,
    )
    from .best import best_checkpoint
    from .distributed import launch
    from .estimators import DDPO, DPO, GRPO, BestOf
    from .evaluation import Validation, evaluate
    from .gradient import reward_gradient
    from .guidance import RewardGuidance
    from .long_clips import extend
    from .lora import Adapter
    from .memory_planner import memory
    from .models import load
    from .prompts import Prompt
    from .race_results import Race
    from .racing import race
    from .rewards import check, reward
    from .sampling import Sampling, sample
    from .strategies import (
        DirectAlign,
        DRaFTLV,
        DRTune,
        Frames,
        Last,
        LeapAlign,
        Random,
        ReFL,
        Step,
    )
    from .trainer import TrainConfig, Trainer, align
    from .video import Gallery, Video

_NAMES = {
    "best": ("best_checkpoint",),
    "distributed": ("launch",),
    "estimators": ("BestOf", "DDPO", "DPO", "GRPO"),
    "evaluation": ("Validation", "evaluate"),
    "gradient": ("reward_gradient",),
    "guidance": ("RewardGuidance",),
    "long_clips": ("extend",),
    "lora": ("Adapter",),
    "memory_planner": ("memory",),
    "models": ("load",),
    "prompts": ("Prompt",),
    "publish": (),
    "race_results": ("Race",),
    "racing": ("race",),
    "recipes": (),
    "rewards": ("check", "reward"),
    "sampling": ("Sampling", "sample"),
    "speed": (),
    "strategies": (
        "DRaFTLV",
        "DRTune",
        "DirectAlign",
        "Frames",
        "Last",
        "LeapAlign",
        "Random",
        "ReFL",
        "Step",
    ),
    "trainer": ("TrainConfig", "Trainer", "align"),
    "video": ("Gallery", "Video"),
    "zoo": (),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
_INNER = {"best", "evaluation", "long_clips", "memory_planner", "race_results", "racing"}
_MODULES = sorted(_NAMES.keys() - _INNER)
__all__ = ["__version__", *_MODULE_OF, *_MODULES]


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
