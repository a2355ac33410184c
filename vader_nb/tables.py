"""Tables of what there is: as text in a shell, in a notebook, and in the README."""

import html
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(repr=False)
class Table:
    """A table of rows whose first cell names the row.

    Attributes:
        headings: of the columns.
        rows: cells, one per heading.
        short: the headings of the columns that fit on a page.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    short: Sequence[str] = ()

    def __repr__(self) -> str:
        blocks = []
        for name, *cells in self.rows:
            lines = [f"  {heading:<13} {cell}" for heading, cell in zip(self.headings[1:], cells)]
            blocks.append("\n".join([name, *lines]))
        return "\n\n".join(blocks)

    def _repr_html_(self) -> str:
        left = "style='text-align:left'"
        lines = ["".join(f"<th {left}>{heading}</th>" for heading in self.headings)]
        for row in self.rows:
            lines.append("".join(f"<td {left}>{html.escape(cell)}</td>" for cell in row))
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        return f"<div style='overflow-x:auto'><table>{body}</table></div>"

    def markdown(self) -> str:
        """The columns `short`."""
        columns = [list(self.headings).index(heading) for heading in self.short]
        lines = [[row[i] for i in columns] for row in (self.headings, *self.rows)]
        lines.insert(1, ["---"] * len(columns))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
