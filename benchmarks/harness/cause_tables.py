"""Recorded cells over their bars as Markdown: how many for each cause, and all of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from dak_inductor.benchmarks.harness import attention_causes, linear_causes
from dak_inductor.benchmarks.harness.grid_record import GridRecord, Missed, missed

SUMMARY_HEAD = (
    "cause", "cells and bars", "worst, of the limit", "T - L, us", "T - C, us",
    "T less that with nothing remote, us",
)  # fmt: skip
_OURS = ("direct", "kernel")
"""What records call our own kernel, of linears and of attention."""


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_cause(grid: GridRecord) -> dict[str, list[Missed]]:
    """The most frequent cause first, what was not isolated last."""
    cause = attention_causes.cause if grid.attention else linear_causes.cause
    found: dict[str, list[Missed]] = {}
    for over in missed(grid):
        found.setdefault(cause(grid, over), []).append(over)
    last = linear_causes.NOT_ISOLATED
    order = sorted(found, key=lambda name: (name == last, -len(found[name]), name))
    return {name: found[name] for name in order}


def summary(grid: GridRecord) -> str:
    """A line for each cause."""
    rows = []
    for name, cells in by_cause(grid).items():
        remote = [each for each in cells if each.cell["fraction"] > 0]
        rows.append(
            [
                name,
                str(len(cells)),
                f"{max(each.excess for each in cells):.2f}",
                _range(each.over_bound for each in cells),
                _range(each.over_resident for each in cells),
                _range(
                    each.cell["microseconds"] - grid.without_remote(each.cell)
                    for each in remote
                    if grid.without_remote(each.cell)
                ),
            ]
        )
    return markdown(SUMMARY_HEAD, rows)


def listing(grid: GridRecord) -> str:
    """Every cell, a table for each cause."""
    parts = []
    for name, cells in by_cause(grid).items():
        columns = ("bar", "shape", "remote", "cells") if not grid.attention else (
            "bar", "shape", "cells")  # fmt: skip
        key, entry = (_attention_key, _attention_entry) if grid.attention else (_key, _entry)
        lines: dict[tuple[str, ...], list[str]] = {}
        for each in cells:
            lines.setdefault(key(each), []).append(entry(each))
        table = markdown(columns, ([*line, ", ".join(found)] for line, found in lines.items()))
        parts.append(f"### {name}: {len(cells)}\n\n{table}")
    return "\n\n".join(parts)


def fits(grids: Sequence[GridRecord]) -> str:
    """T and C with nothing remote as a fixed part and a rate, by tokens."""
    rows = []
    for grid in grids:
        for tokens in sorted({cell["M"] for cell in grid.cells}):
            cells = [c for c in grid.cells if c["M"] == tokens and c["fraction"] == 0.0]
            own = [c for c in cells if c["served_by"] == "direct"]
            rows.append(
                [
                    grid.name, str(tokens), str(len(own)),
                    *_fit([(c["weight_bytes"], c["microseconds"]) for c in own]),
                    *_fit([(c["weight_bytes"], c["C_microseconds"]) for c in cells]),
                ]
            )  # fmt: skip
    head = (
        "grid", "tokens", "cells by the kernel", "kernel, us", "kernel, GB/s", "cuBLAS, us",
        "cuBLAS, GB/s",
    )  # fmt: skip
    return markdown(head, rows)


def beyond_link(grids: Sequence[GridRecord]) -> str:
    """T - L where the remote bytes take at least twice what the local ones do, by tokens."""
    rows = []
    for grid in grids:
        for tokens in sorted({cell["M"] for cell in grid.cells}):
            found = [
                cell["microseconds"] - cell["L_microseconds"]
                for cell in grid.cells
                if cell["M"] == tokens
                and cell["served_by"] == "direct"
                and cell["weight_bytes"] >= 16e6
                and grid.remote(cell) >= linear_causes.BALANCE * grid.local(cell) > 0.0
            ]
            if len(found) < 3:
                continue
            low, *_, high = statistics.quantiles(found, n=10)
            rows.append(
                [
                    grid.name, str(tokens), str(len(found)), f"{low:.1f}",
                    f"{statistics.median(found):.1f}", f"{high:.1f}",
                ]
            )  # fmt: skip
    return markdown(("grid", "tokens", "cells", "lowest tenth", "median", "highest tenth"), rows)


def over_bound(grid: GridRecord, tokens: int | None = None) -> str:
    """T - L by shape and share remote, of linears with so many tokens; who served it, if stock."""
    cells = [cell for cell in grid.cells if cell.get("M") == tokens]
    shares = sorted({cell["fraction"] for cell in cells})
    lines: dict[str, dict[float, str]] = {}
    for cell in cells:
        more = cell["microseconds"] - cell["L_microseconds"]
        served = cell.get("served_by")
        way = "" if served in (None, *_OURS) else f" {served}"
        lines.setdefault(cell["shape"], {})[cell["fraction"]] = f"{more:.1f}{way}"
    rows = ([shape, *(found.get(share, "-") for share in shares)] for shape, found in lines.items())
    return markdown(("shape", *map(_share, shares)), rows)


def _range(values: Iterable[float]) -> str:
    """Least, median and most."""
    found = sorted(values)
    if not found:
        return "-"
    return " / ".join(f"{value:.1f}" for value in _rounded(found))


def _rounded(found: Sequence[float]) -> list[float]:
    """Without a sign on what rounds to zero."""
    return [round(value, 1) + 0.0 for value in (found[0], statistics.median(found), found[-1])]


def _fit(points: Sequence[tuple[float, float]]) -> tuple[str, str]:
    """Least squares of (bytes, microseconds): the fixed part, and GB/s."""
    if len(points) < 6:
        return "-", "-"
    slope, fixed = statistics.linear_regression(*zip(*points, strict=True))
    return f"{fixed:.1f}", f"{1e-3 / slope:.0f}"


def _share(fraction: float) -> str:
    return f"{100 * fraction:g}%"


def _key(over: Missed) -> tuple[str, ...]:
    return over.bar, over.cell["shape"], _share(over.cell["fraction"])


def _entry(over: Missed) -> str:
    way = over.cell["served_by"]
    return (
        f"M={over.cell['M']}: {over.excess:.2f} ({over.over_bound:+.1f}"
        f"{'' if way == 'direct' else ', ' + way})"
    )


def _attention_key(over: Missed) -> tuple[str, ...]:
    return over.bar, over.cell["shape"]


def _attention_entry(over: Missed) -> str:
    return f"{_share(over.cell['fraction'])}: {over.excess:.2f} ({over.over_bound:+.1f})"
