"""The embedded tiny models: real checkpoints in the layouts of the big ones, and the world they know."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"


def adapters() -> dict[str, Path]:
    """Paths of the shipped adapters of "tiny", by the reward that each was aligned to; first the one that shows most."""
    return {
        name: WEIGHTS / "tiny-adapters" / f"{name}.safetensors"
        for name in ("aesthetic", "hps", "action")
    }
