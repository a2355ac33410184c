"""Control panels for notebooks, made of ipywidgets' own parts, 7.7 (Colab) or 8.

Each is one call, usable without a browser; nothing in the package imports them.
"""

from .comparison import RewardComparison
from .composer import RewardComposer
from .monitor import TrainingMonitor
from .planner import MemoryPlanner
from .run_viewer import RunViewer
from .sampler import Sampler
from .truncation import TruncationExplorer

__all__ = [
    "MemoryPlanner",
    "RewardComparison",
    "RewardComposer",
    "RunViewer",
    "Sampler",
    "TrainingMonitor",
    "TruncationExplorer",
]
