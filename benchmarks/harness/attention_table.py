"""The grid of decode attention on a terminal: a line per shape, T / L per remote fraction."""

from __future__ import annotations

from collections.abc import Sequence

from dak_inductor.benchmarks.harness.cell_table import Row, cells_over, entry
from dak_inductor.benchmarks.harness.table import table

OVER_COLUMNS = (
    "shape", "fraction", "microseconds", "L_microseconds", "C_microseconds", "T/L", "T/C",
    "hbm_share", "link_share", "excess", "bar",
)  # fmt: skip


def grid_table(rows: Sequence[Row]) -> str:
    """T / L (T / C where nothing is remote), marked as `entry` says."""
    fractions = sorted({float(str(row["fraction"])) for row in rows})
    lines: dict[object, dict[str, object]] = {}
    for row in rows:
        line = lines.setdefault(row["shape"], {"shape": row["shape"]})
        ratio = "T/L" if row["fraction"] else "T/C"
        line[str(float(str(row["fraction"])))] = entry(row, ratio)
    return table(list(lines.values()), ("shape", *(str(fraction) for fraction in fractions)))


def over_table(rows: Sequence[Row]) -> str:
    """The cells over a bar, the furthest first."""
    return cells_over(rows, OVER_COLUMNS)
