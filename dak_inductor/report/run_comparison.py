"""Two records of one benchmark side by side: cells and verdicts that both have."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from dak_inductor.quantity_text import count_text
from dak_inductor.report.html import Html, cell, join, number, table, tag
from dak_inductor.report.records import LoadedRecord

IDENTITY = ("case", "shape", "M", "provider", "fraction", "remote", "backend", "run",
            "direction", "stages", "tensor_bytes", "creators", "repeat")  # fmt: skip
METRICS = ("T/L", "tpot T/L", "ttft T/L", "tpot_ms", "ttft_ms", "milliseconds", "microseconds",
           "compile_seconds", "pause_milliseconds", "seconds")  # fmt: skip
"""The first that both cells have is compared; less is better in all of them."""
NOISE = 0.02


def share_cells(old: LoadedRecord, new: LoadedRecord) -> bool:
    """Whether there is anything to compare: parts of one run have neither cells nor verdicts in
    common."""
    cells = {_key(row) for row in old.cells} & {_key(row) for row in new.cells}
    named = {v.get("name") for v in old.verdicts} & {v.get("name") for v in new.verdicts}
    nameless = {()}  # samples of a run: their verdicts are compared
    return bool(cells - nameless) or (cells == nameless and bool(named))


def comparison(old: LoadedRecord, new: LoadedRecord) -> Html:
    """Ratios new / old, the worst first."""
    before = {_key(row): row for row in old.cells}
    rows, ratios = [], []
    for row in new.cells:
        metric, a, b = _pair(before.get(_key(row)), row)
        if not metric:
            continue
        ratio = b / a
        ratios.append(ratio)
        kind = "ok" if ratio < 1 - NOISE else "bad" if ratio > 1 + NOISE else ""
        words = ", ".join(f"{k} {v}" if k in ("M", "fraction") else str(v) for k, v in _key(row))
        rows.append(
            (ratio, [words, metric, number(a), number(b), cell(f"{ratio:.3f}", f"n {kind}")])
        )
    rows.sort(key=lambda pair: -pair[0])
    parts = [tag("p", f"old: {old.label}"), tag("p", f"new: {new.label}")]
    if old.environment.get("gpu") != new.environment.get("gpu"):
        parts.append(tag("p", "The two ran on different machines.", class_="bad"))
    if ratios:
        better = sum(r < 1 - NOISE for r in ratios)
        worse = sum(r > 1 + NOISE for r in ratios)
        words = (
            f"{count_text(len(ratios), 'cell')} in both: {better} faster and {worse} slower "
            f"by more than {NOISE:.0%}; median {statistics.median(ratios):.3f}"
        )
        parts.append(tag("p", words))
        headings = ("cell", "metric", "old", "new", "new / old")
        parts.append(table(headings, [row for _, row in rows], numbers=range(2, 5)))
    else:
        parts.append(tag("p", "No cell is in both."))
    return join([*parts, _verdicts(old, new)])


def _verdicts(old: LoadedRecord, new: LoadedRecord) -> Html:
    words: dict[object, str] = {True: "pass", False: "MISS"}
    before = {v.get("name"): v for v in old.verdicts}
    rows = []
    for verdict in new.verdicts:
        was = before.get(verdict.get("name"))
        if was is None:
            continue
        first, then = (words.get(v.get("passed"), "open") for v in (was, verdict))
        kind = "" if first == then else "bad" if then == "MISS" else "ok"
        rows.append([verdict.get("name"), number(was.get("measured")),
                     number(verdict.get("measured")), first, cell(then, kind)])  # fmt: skip
    headings = ("verdict", "old", "new", "was", "is")
    return table(headings, rows, numbers=range(1, 3)) if rows else Html("")


def _key(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    if "case" in row:
        return (("case", str(row["case"])),)
    return tuple((name, str(row[name])) for name in IDENTITY if name in row)


def _pair(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> tuple[str, float, float]:
    for metric in METRICS if old is not None else ():
        a, b = (row.get(metric) if row else None for row in (old, new))
        if isinstance(a, int | float) and isinstance(b, int | float) and a > 0:
            return metric, float(a), float(b)
    return "", 0.0, 0.0
