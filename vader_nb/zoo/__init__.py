"""The embedded tiny models: real checkpoints in the layouts of the big ones, and the scripts that made them."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
