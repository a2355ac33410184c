"""Every reward in a table: what it sees, needs and costs, and when it fails. Loads no weights."""

import html
from dataclasses import dataclass
from pathlib import Path

import yaml

from .. import hub


@dataclass(frozen=True)
class Card:
    """One line of the table.

    Attributes:
        parameters: millions.
        typical: scores of usual pictures or clips.
        beside: GB beside the weights while one clip of 16 frames of 256 x 256 is scored, forward
            and backward, in float16 (measured by tests/benchmarks/reward_memory.py).
    """

    name: str
    sees: str
    fails: str
    backbone: str = "formula"
    sources: tuple[str, ...] = ()
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
            ", ".join(downloads) or "none",
            ", ".join(dict.fromkeys(licenses)) or "ours",
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


class Table:
    """The table of all rewards: as text, in a notebook, or with `.markdown()` for a README."""

    def __init__(self):
        self.rows = [card.row() for card in CARDS.values()]

    def __repr__(self) -> str:
        blocks = []
        for name, *cells in self.rows:
            lines = [f"  {heading:<13} {cell}" for heading, cell in zip(HEADINGS[1:], cells)]
            blocks.append("\n".join([name, *lines]))
        return "\n\n".join(blocks)

    def _repr_html_(self) -> str:
        left = "style='text-align:left'"
        lines = ["".join(f"<th {left}>{heading}</th>" for heading in HEADINGS)]
        for row in self.rows:
            lines.append("".join(f"<td {left}>{html.escape(cell)}</td>" for cell in row))
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        return f"<div style='overflow-x:auto'><table>{body}</table></div>"

    def markdown(self) -> str:
        """The columns that fit on a page."""
        columns = [HEADINGS.index(heading) for heading in README_HEADINGS]
        lines = [[row[i] for i in columns] for row in (HEADINGS, *self.rows)]
        lines.insert(1, ["---"] * len(columns))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table() -> Table:
    """All rewards: what each sees, its download, license and memory, usual scores, failures."""
    return Table()
