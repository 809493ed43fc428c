"""The grid of linears on a terminal: a line per shape and fraction, T / L per token count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dak_inductor.benchmarks.harness.table import table

MOST_LISTED = 60
OVER_COLUMNS = (
    "shape", "fraction", "M", "microseconds", "T/L", "T/C", "hbm_share", "link_share", "excess",
    "bar",
)  # fmt: skip

Row = Mapping[str, object]


def grid_table(rows: Sequence[Row]) -> str:
    """T / L; '!' where a bar is missed, 'bad' where the result is wrong, 'x' where it failed."""
    tokens = sorted({int(str(row["M"])) for row in rows})
    lines: dict[tuple[object, object], dict[str, object]] = {}
    for row in rows:
        line = lines.setdefault(
            (row["shape"], row["fraction"]), {"shape": row["shape"], "remote": row["fraction"]}
        )
        line[f"M={row['M']}"] = _entry(row)
    return table(list(lines.values()), ("shape", "remote", *(f"M={count}" for count in tokens)))


def over_table(rows: Sequence[Row]) -> str:
    """The cells over a bar, the furthest first: one line per cell and bar."""
    found = [
        {**row, "bar": bar, "excess": excess}
        for row in rows
        for bar, excess in _mapping(row.get("over")).items()
    ]
    found.sort(key=lambda row: -float(str(row["excess"])))
    text = table(found[:MOST_LISTED], OVER_COLUMNS)
    rest = len(found) - MOST_LISTED
    return f"{text}\n... and {rest} more in the record" if rest > 0 else text


def _entry(row: Row) -> str:
    if row.get("status") == "failed":
        return "x"
    if not row.get("accurate"):
        return "bad"
    mark = "!" if row.get("over") else ""
    return f"{float(str(row['T/L'])):.3f}{mark}"


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
