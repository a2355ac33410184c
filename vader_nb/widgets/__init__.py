"""Control panels for notebooks, made of ipywidgets' own parts, 7.7 (Colab) or 8.

Each is one call, usable without a browser, imported on first use, and by nothing in the package.
"""

import importlib

_MODULES = {
    "MemoryPlanner": "planner",
    "RewardComparison": "comparison",
    "RewardComposer": "composer",
    "Sampler": "sampler",
    "TrainingMonitor": "monitor",
    "TruncationExplorer": "truncation",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
