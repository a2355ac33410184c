"""Controls for notebooks, of ipywidgets' own parts: each is one call, and the same object works without a browser.

Nothing else in the package imports them. They run on ipywidgets 7.7 (Colab) and 8.
"""

from .._face import install

_HOMES = {
    "MemoryPlanner": "planner",
    "RewardComparison": "comparison",
    "RewardComposer": "composer",
    "Sampler": "sampler",
    "TrainingMonitor": "monitor",
    "TruncationExplorer": "truncation",
}
__all__ = sorted(_HOMES)

install(__name__, _HOMES)
