"""The grid of linears on a terminal: a line per shape and fraction, T / L per token count."""

from __future__ import annotations

from collections.abc import Sequence

from dak_inductor.benchmarks.harness.cell_table import Row, cells_over, entry
from dak_inductor.benchmarks.harness.table import table

OVER_COLUMNS = (
    "shape", "fraction", "M", "microseconds", "T/L", "T/C", "hbm_share", "link_share", "excess",
    "bar",
)  # fmt: skip


def grid_table(rows: Sequence[Row]) -> str:
    """T / L, marked as `entry` says."""
    tokens = sorted({int(str(row["M"])) for row in rows})
    lines: dict[tuple[object, object], dict[str, object]] = {}
    for row in rows:
        line = lines.setdefault(
            (row["shape"], row["fraction"]), {"shape": row["shape"], "remote": row["fraction"]}
        )
        line[f"M={row['M']}"] = entry(row, "T/L")
    return table(list(lines.values()), ("shape", "remote", *(f"M={count}" for count in tokens)))


def over_table(rows: Sequence[Row]) -> str:
    """The cells over a bar, the furthest first."""
    return cells_over(rows, OVER_COLUMNS)
