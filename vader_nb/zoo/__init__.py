"""The embedded tiny models: real checkpoints in the layouts of the big ones, and the world they know."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
RACES = Path(__file__).parent / "races"


def adapters() -> dict[str, Path]:
    """Paths of the shipped adapters of "tiny", by the reward that each was aligned to; first the one that shows most."""
    return {
        name: WEIGHTS / "tiny-adapters" / f"{name}.safetensors"
        for name in ("aesthetic", "hps", "action")
    }


def races() -> dict[str, Path]:
    """Folders of the published races, for `Race`, by the name of their configuration."""
    return {path.parent.name: path.parent for path in sorted(RACES.glob("*/race.json"))}
