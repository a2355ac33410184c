"""Every model in a table: what it takes, needs and costs, and what was tested. Loads no weights."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from ..tables import Table
from . import CHECKPOINTS, checkpoint_of, family_of
from .base import EARLIER_STEPS, SMALL_GAIN


@dataclass(frozen=True)
class Card:
    """What a checkpoint does not say itself. All but `tested` is printed by tests/benchmarks/models.py.

    Attributes:
        tested: how, where this was written.
        clip: frames, height and width by default.
        parameters: millions, of the denoisers.
        gain: `VideoModel.last_step_gain`.
        resident, offloaded: GiB at the peak of a training step with HPSv2.1, one clip, K = 1,
            everything resident, or with model offload, sequential guidance, and a causal decoder's states in
            CPU memory; simulated.
    """

    tested: str
    clip: tuple[int, int, int]
    parameters: float
    gain: float
    resident: float
    offloaded: float

    def advice(self) -> str:
        """On K."""
        if self.gain < SMALL_GAIN:
            return f"gain {self.gain:g}: K = 1 learns next to nothing, use {EARLIER_STEPS}"
        # For tiny-i2v, with 0.05, 40 steps at K = 1 raised nothing; at K = 5 they raised the reward and a held-out one.
        return f"gain {self.gain:g}: {'K = 1 learns' if self.gain >= 0.1 else 'K = 1 learns little, use a larger K'}"


HEADINGS = ("model", "takes", "clip", "denoiser", "download", "license", "training, GiB")
HEADINGS += ("last step", "decoding", "tested")
README_HEADINGS = tuple(h for h in HEADINGS if h not in ("last step", "decoding"))
_DATA = yaml.safe_load((Path(__file__).parent / "cards.yaml").read_text(encoding="utf-8"))
CARDS = {name: Card(**fields) for name, fields in _DATA.items()}


def row(name: str) -> tuple[str, ...]:
    """The cells under `HEADINGS`."""
    card, checkpoint = CARDS[name], checkpoint_of(name)
    family = family_of(checkpoint)
    frames, height, width = card.clip
    decoding = "frame by frame" if family.independent_frames else "in chunks"
    embedded = checkpoint.world == "tiny"
    return (
        name,
        "an image" if family.takes_image else "text",
        f"{frames} frames of {height}×{width}",
        f"{card.parameters:g} M",
        "embedded" if embedded else checkpoint.size,
        checkpoint.license,
        "below 0.1" if embedded else f"{card.resident:g}, offloaded {card.offloaded:g}",
        card.advice(),
        f"{decoding}, exact" if family.exact else f"{decoding}, approximate",
        card.tested,
    )


def table() -> Table:
    """All models: what each takes, its size, license and memory, advice on K, and what was tested."""
    return Table(HEADINGS, [row(name) for name in CHECKPOINTS], README_HEADINGS)
