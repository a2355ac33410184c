"""Rewards, imported on first use: none needs the libraries of another.

Arguments that the ones with networks share: `checkpoint`, "published" or another name, or the path
of a local copy; `dtype` of the weights; `from_config`, to make networks from their configuration
without weights, in torch's default dtype, for fake tensors (see `vader_nb.memory`). They raise
ValueError for an unknown checkpoint or one that does not fit, and FileNotFoundError for weights
that cannot be found.
"""

# ruff: noqa: F401
import importlib
from typing import TYPE_CHECKING

from .base import (
    JudgeError,
    Reward,
    as_reward,
    conflict,
    pixel_gradient,
    record_parts,
    reward,
    statistics,
)
from .expression import EMBEDDED, MODULES, NAMES, parse

if TYPE_CHECKING:
    from .blip import image_reward
    from .checking import check
    from .classifier import class_probability
    from .clip import clip_score, hps, pickscore
    from .coded import h264_bytes, jpeg_bytes
    from .detection import object_presence, object_removal
    from .dino import subject_consistency
    from .flow import flow_smoothness
    from .gallery import table
    from .heads import aesthetic, aesthetic_hps, compression, rainy, snowy
    from .pixels import (
        brightness,
        colorfulness,
        compressibility,
        incompressibility,
        motion_smoothness,
    )
    from .prism import videoprism
    from .remote import server
    from .video_align import video_reward
    from .video_mae import action
    from .vjepa import temporal_consistency
    from .vlm import vlm_yes
    from .xclip import text_video

_MODULES = MODULES | {"check": "checking", "table": "gallery"}
__all__ = [
    "EMBEDDED",
    "JudgeError",
    "NAMES",
    "Reward",
    "as_reward",
    "conflict",
    "parse",
    "reward",
    "statistics",
]
__all__ += sorted(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
