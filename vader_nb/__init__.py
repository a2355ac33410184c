"""vader_nb: align video diffusion models to differentiable rewards (VADER, arXiv 2407.08737).

    import vader_nb
    model = vader_nb.load("tiny")
    run = vader_nb.align(model, vader_nb.rewards.hps("tiny"), vader_nb.prompts.get("tiny"))

Names are imported on first use: `import vader_nb` itself loads nothing heavy.
"""

from ._face import install

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "lora",
    "DRTune": "gradient",
    "DRaFTLV": "gradient",
    "Frames": "gradient",
    "Gallery": "video",
    "Last": "gradient",
    "Random": "gradient",
    "ReFL": "gradient",
    "Sampling": "gradient",
    "Step": "gradient",
    "Validation": "best",
    "Video": "video",
    "align": "align",
    "best_checkpoint": "best",
    "check": "rewards",
    "evaluate": "evaluate",
    "launch": "parallel",
    "load": "models",
    "memory": "memory",
    "reward": "rewards",
    "reward_gradient": "gradient",
    "sample": "gradient",
}
_MODULES = ("gradient", "lora", "models", "parallel", "prompts", "rewards", "speed", "video", "zoo")
__all__ = ["__version__", *_HOMES, *_MODULES]

install(__name__, _HOMES, _MODULES)
