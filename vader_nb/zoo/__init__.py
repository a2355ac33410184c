"""The embedded tiny models: real checkpoints in the layouts of the big ones, and the scripts that made them."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"


def adapters() -> dict[str, Path]:
    """The shipped adapters of the model "tiny", by the reward that each was aligned to; first the one that shows most."""
    return {
        name: WEIGHTS / "tiny-adapters" / f"{name}.safetensors"
        for name in ("aesthetic", "hps", "action")
    }
