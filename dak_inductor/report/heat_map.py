"""A grid of measured cells as a heat map: T/L by shape and tokens against the remote fraction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dak_inductor.quantity_text import count_text
from dak_inductor.report.html import Html, cell, details, join, table, tag

STEPS = (1.02, 1.05, 1.1, 1.2, 1.35, 1.6, 2.5)
"""Upper limits of the colours h0 to h6 of T/L; above them h7."""


def colour(ratio: float) -> str:
    """The class of a cell."""
    return f"h{sum(ratio > step for step in STEPS)}"


def heat_maps(cells: Sequence[Mapping[str, Any]]) -> Html:
    """One map: a row for each shape and number of tokens, a column for each fraction.

    A cell that missed a bar has a frame and names the bars; one that failed says so.
    """
    grid = [row for row in cells if "shape" in row and "fraction" in row]
    if not grid:
        return Html("")
    fractions = sorted({float(row["fraction"]) for row in grid})
    lines: dict[tuple[str, str], dict[float, Mapping[str, Any]]] = {}
    for row in grid:
        key = (str(row["shape"]), str(row.get("M", "")))
        lines.setdefault(key, {})[float(row["fraction"])] = row
    tokens = any(m for _, m in lines)
    headings = ["shape", *(["M"] if tokens else []), *(f"{f * 100:g}%" for f in fractions)]
    body = [
        [shape, *([m] if tokens else []), *(_cell(at.get(f)) for f in fractions)]
        for (shape, m), at in lines.items()
    ]
    missed = sum(bool(row.get("over")) for row in grid)
    words = (
        f"T / L of {count_text(len(grid), 'cell')} by the share remote; {missed} missed a bar "
        "(framed; listed below)"
    )
    if any(row.get("status", "ok") != "ok" for row in grid):
        words += ". What failed, or is not accurate, has a mark (!)"
    scale = [tag("span", f"up to {limit:g}", class_=f"key h{i}") for i, limit in enumerate(STEPS)]
    scale.append(tag("span", f"above {STEPS[-1]:g}", class_=f"key h{len(STEPS)}"))
    parts = [tag("p", words), tag("p", *scale), table(headings, body, numbers=range(1, 99))]
    return join([*parts, _missed(grid)])


def _missed(grid: Sequence[Mapping[str, Any]]) -> Html:
    """The same misses as a list, the worst first: a finger on a screen shows no titles."""
    rows = [
        (times, [row["shape"], row.get("M", ""), f"{float(row['fraction']) * 100:g}%",
                 f"{times:.3f}", cell(bar, "note")])
        for row in grid
        for bar, times in (row.get("over") or {}).items()
        if isinstance(times, int | float)
    ]  # fmt: skip
    if not rows:
        return Html("")
    rows.sort(key=lambda pair: -pair[0])
    headings = ("shape", "M", "remote", "times its bar", "bar")
    listed = table(headings, [row for _, row in rows], numbers=range(1, 4))
    return details(count_text(len(rows), "miss", "misses"), listed)


def _cell(row: Mapping[str, Any] | None) -> Html:
    if row is None:
        return cell("", "n")
    ratio = row.get("T/L")
    if not isinstance(ratio, int | float):
        return cell(str(row.get("status", "?")), "n bad", str(row.get("reason", "")))
    over = row.get("over") or {}
    told = [f"{bar}: {times:.3g} times" for bar, times in over.items()]
    if row.get("status", "ok") != "ok":
        told.append(str(row["status"]))
    if "microseconds" in row:
        told.append(f"{row['microseconds']:.1f} us")
    frame = " miss" if over else ""
    wrong = " !" if row.get("status", "ok") != "ok" else ""
    return cell(f"{ratio:.2f}{wrong}", f"{colour(float(ratio))}{frame}", "; ".join(told))
