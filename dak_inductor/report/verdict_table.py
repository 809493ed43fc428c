"""Every verdict of every record: the figure, its bar, pass or miss. Many that passed are folded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dak_inductor.quantity_text import bytes_text, seconds_text
from dak_inductor.report.html import Html, cell, details, join, number, table
from dak_inductor.report.records import LoadedRecord

MANY = 40
"""Verdicts; with more of them those that passed would hide the others."""

_HEADINGS = ("verdict", "what", "measured", "bar", "unit", "note", "record")
_WORDS = {True: ("pass", "ok"), False: ("MISS", "bad"), None: ("open", "open")}


def verdict_table(records: Iterable[LoadedRecord]) -> Html:
    """Misses first within each record; nothing where no record has a verdict."""
    rows = [
        (verdict.get("passed") is True, [*_row(verdict), cell(record.path.name, "")])
        for record in records
        for verdict in sorted(record.verdicts, key=lambda v: v.get("passed") is not False)
    ]
    if len(rows) <= MANY:
        return _table([row for _, row in rows])
    met = [row for passed, row in rows if passed]
    others = [row for passed, row in rows if not passed]
    return join([_table(others), details(f"{len(met)} passed", _table(met))])


def _table(rows: list[list[object]]) -> Html:
    return table(_HEADINGS, rows, numbers=range(2, 4)) if rows else Html("")


def amount(value: object, unit: str) -> str:
    """A figure; bytes and seconds bring the unit that fits them."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if unit in ("B", "B/s"):
            return bytes_text(value) + unit[1:]
        if unit == "s":
            return seconds_text(value)
    return number(value)


def _row(verdict: Mapping[str, Any]) -> list[object]:
    passed = verdict.get("passed")
    unit = str(verdict.get("unit") or "")
    word, kind = _WORDS[passed if isinstance(passed, bool) else None]
    measured, bar = verdict.get("measured"), verdict.get("bar")
    shown = amount(measured, unit)
    if passed is False and shown == amount(bar, unit) and isinstance(measured, float):
        shown = f"{measured:.6g}"
    return [
        cell(word, kind),
        cell(str(verdict.get("name")), "note"),
        shown,
        amount(bar, unit),
        cell("" if unit in ("B", "B/s", "s") else unit, ""),
        cell(str(verdict.get("note") or ""), "note"),
    ]
