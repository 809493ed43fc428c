"""What the tables of grids share: the entry of a cell, and the list of cells over a bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dak_inductor.benchmarks.harness.table import table

MOST_LISTED = 60

Row = Mapping[str, object]


def entry(row: Row, ratio: str) -> str:
    """The column `ratio` of a cell; '!' where a bar is missed, 'bad' where the result is wrong,
    'x' where it failed."""
    if row.get("status") == "failed":
        return "x"
    if not row.get("accurate"):
        return "bad"
    return f"{float(str(row[ratio])):.3f}{'!' if row.get('over') else ''}"


def cells_over(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """The cells over a bar, the furthest first: one line per cell and bar."""
    found = []
    for row in rows:
        over = row.get("over")
        if isinstance(over, Mapping):
            found += [{**row, "bar": bar, "excess": excess} for bar, excess in over.items()]
    found.sort(key=lambda row: -float(str(row["excess"])))
    text = table(found[:MOST_LISTED], columns)
    rest = len(found) - MOST_LISTED
    return f"{text}\n... and {rest} more in the record" if rest > 0 else text
