"""Every reward in a table: what it sees, needs and costs, and when it fails. Loads no weights."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from .. import hub
from ..tables import Table


@dataclass(frozen=True)
class Card:
    """One line of the table.

    Attributes:
        parameters: millions.
        typical: scores of usual pictures or clips.
        download, license: where no published weights decide them.
        beside: GB beside the weights while one clip of 16 frames of 256 x 256 is scored, forward
            and backward, in float16 (measured by tests/benchmarks/reward_memory.py).
    """

    name: str
    sees: str
    fails: str
    backbone: str = "formula"
    sources: tuple[str, ...] = ()
    download: str = "none"
    license: str = "ours"
    parameters: float = 0
    typical: tuple[float, float] | None = None
    beside: float | None = None

    def row(self) -> tuple[str, ...]:
        """The cells under `HEADINGS`."""
        downloads, licenses = [], []
        for source in (SOURCES[name] for name in self.sources):
            is_address = source.repo.startswith("https://")
            downloads.append(f"{source.filename if is_address else source.repo}, {source.size}")
            forbidden = " (not for commercial use)" if "-NC" in source.license else ""
            licenses.append(source.license + forbidden)
        if "your file" in self.backbone:
            licenses.append("none stated for the head")
        memory = f"{self.parameters * 2 / 1e3:.2f} GB + {self.beside or 'not measured'}"
        return (
            self.name,
            self.sees,
            self.backbone,
            ", ".join(downloads) or self.download,
            ", ".join(dict.fromkeys(licenses)) or self.license,
            memory if self.parameters else "none",
            "{:g} to {:g}".format(*self.typical) if self.typical else "-",
            self.fails,
        )


HEADINGS = ("reward", "sees", "backbone", "download", "license", "fp16 memory", "typical", "fails")
README_HEADINGS = ("reward", "sees", "backbone", "download", "license", "fails")

_DATA = yaml.safe_load((Path(__file__).parent / "cards.yaml").read_text(encoding="utf-8"))
SOURCES = {name: hub.Source(**fields) for name, fields in _DATA["sources"].items()}
CARDS = {name: Card(name, **fields) for name, fields in _DATA["cards"].items()}


def find(checkpoint: hub.StrPath, *names: str, **more: Path) -> hub.Source | Path:
    """`hub.find` among sources of these names, of which the first is the published one."""
    known = {name: SOURCES[name] for name in names}
    return hub.find(checkpoint, {"published": SOURCES[names[0]], **known, **more})


def table() -> Table:
    """All rewards: what each sees, its download, license and memory, usual scores, failures."""
    return Table(HEADINGS, [card.row() for card in CARDS.values()], README_HEADINGS)
