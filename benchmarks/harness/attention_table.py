"""The grid of decode attention on a terminal: a line per shape, T / L per remote fraction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dak_inductor.benchmarks.harness.table import table

MOST_LISTED = 60
OVER_COLUMNS = (
    "shape", "fraction", "microseconds", "L_microseconds", "C_microseconds", "T/L", "T/C",
    "hbm_share", "link_share", "excess", "bar",
)  # fmt: skip

Row = Mapping[str, object]


def grid_table(rows: Sequence[Row]) -> str:
    """T / L (T / C where nothing is remote); '!' where a bar is missed, 'bad' where the result is
    wrong, 'x' where it failed."""
    fractions = sorted({float(str(row["fraction"])) for row in rows})
    lines: dict[object, dict[str, object]] = {}
    for row in rows:
        line = lines.setdefault(row["shape"], {"shape": row["shape"]})
        line[str(float(str(row["fraction"])))] = _entry(row)
    return table(list(lines.values()), ("shape", *(str(fraction) for fraction in fractions)))


def over_table(rows: Sequence[Row]) -> str:
    """The cells over a bar, the furthest first: one line per cell and bar."""
    found = []
    for row in rows:
        over = row.get("over")
        if isinstance(over, Mapping):
            found += [{**row, "bar": bar, "excess": excess} for bar, excess in over.items()]
    found.sort(key=lambda row: -float(str(row["excess"])))
    text = table(found[:MOST_LISTED], OVER_COLUMNS)
    rest = len(found) - MOST_LISTED
    return f"{text}\n... and {rest} more in the record" if rest > 0 else text


def _entry(row: Row) -> str:
    if row.get("status") == "failed":
        return "x"
    if not row.get("accurate"):
        return "bad"
    ratio = row["T/L"] if row["fraction"] else row["T/C"]
    return f"{float(str(ratio)):.3f}{'!' if row.get('over') else ''}"
