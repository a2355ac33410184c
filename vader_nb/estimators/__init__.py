"""What turns a batch of prompts into a gradient: one page for each method, on the same trainer.

| | learns from |
|---|---|
| `RewardGradient` | the reward's gradient, through the last denoising steps |
| `DDPO` | rewards, compared with a prompt's earlier ones; probabilities of denoising steps |
| `GRPO` | rewards, compared within a group of one prompt; probabilities of denoising steps |
| `DPO` | which of two clips has the higher reward |
| `BestOf` | nothing: it samples n times and keeps the best |
"""

from ..strategies import parse_call
from .base import Batch, Collected, Estimator, Row
from .best_of import BestOf
from .ddpo import DDPO
from .dpo import DPO
from .grpo import GRPO
from .reward_gradient import RewardGradient

__all__ = [
    "DDPO",
    "DPO",
    "GRPO",
    "Batch",
    "BestOf",
    "Collected",
    "Estimator",
    "RewardGradient",
    "Row",
    "parse_estimator",
]
ESTIMATORS = {kind.__name__: kind for kind in (RewardGradient, DDPO, GRPO, DPO)}


def parse_estimator(text: str | Estimator | None) -> Estimator | None:
    """Read an estimator from text, as it is written in Python: `GRPO(group_size=16)`, `ddpo`.

    Raises:
        ValueError: for an unknown name or arguments that the estimator does not take.
    """
    examples = "RewardGradient, DDPO, GRPO(group_size=16), DPO(beta=2000)"
    return parse_call(text, ESTIMATORS, "estimator", examples) if isinstance(text, str) else text
