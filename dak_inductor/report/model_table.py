"""Rows of `dak bench` on a page: one table for each model, batch and share, peers beside each
other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dak_inductor.quantity_text import bytes_text, count_text
from dak_inductor.report.html import Html, cell, join, number, table, tag

HEADINGS = ("provider", "kind", "status", "realised", "TTFT ms", "in calls", "T/L", "TPOT ms",
            "T/L", "tokens/s", "GB/s", "remote", "local B/token", "remote B/token", "card peak",
            "host peak", "compile s", "note")  # fmt: skip
SHOWN = frozenset({
    "kind", "status", "realised", "ttft_ms", "ttft_calls_ms", "ttft T/L", "tpot_ms",
    "tpot T/L", "tokens_per_second", "bandwidth", "remote_bytes", "local_bytes_per_token",
    "remote_bytes_per_token", "card_peak_bytes", "host_peak_bytes", "compile_seconds",
    "compile_cold", "note", "reason", "model_layers", "tpot_method",
})  # fmt: skip
"""Entries of a row that the tables show."""
_NUMBERS = range(3, 17)
LEFT_OUT = "left out"
"""Status of a row that a time limit did not let begin."""


def model_tables(rows: Sequence[Mapping[str, Any]]) -> Html:
    """The fastest of the real peers is marked in each table of measured rows."""
    generating = {row.get("model") for row in rows if "tpot_ms" in row}
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        setting = _setting(row, generates=row.get("model") in generating)
        groups.setdefault(setting, []).append(row)
    parts = []
    for (figure, *words), members in groups.items():
        best = min(
            (t for row in members if (t := _time(row)) is not None and _real(row)), default=None
        )
        lines = [_line(row, marked=figure == "measured" and _time(row) == best) for row in members]
        title = tag("h3", tag("span", figure, class_="open"), ": ", ", ".join(words))
        if all(row.get("status") == LEFT_OUT for row in members):
            parts.append(join([title, tag("p", count_text(len(members), "row"), " left out")]))
        else:
            parts.append(join([title, _filled(lines)]))
    return join(parts)


def _filled(lines: Sequence[Sequence[object]]) -> Html:
    """The table without columns that are empty in every line."""
    empty = ("", cell("", "n"), cell("", ""), cell("", "note"))
    kept = [i for i in range(len(HEADINGS)) if any(line[i] not in empty for line in lines)]
    numbers = {at for at, i in enumerate(kept) if i in _NUMBERS}
    rows = [[line[i] for i in kept] for line in lines]
    return table([HEADINGS[i] for i in kept], rows, numbers=numbers)


def _setting(row: Mapping[str, Any], *, generates: bool) -> tuple[str, ...]:
    """All resident, which has no share, stands in a table of its own; predictions in one."""
    share = row.get("share")
    place = f"{share:.0%} remote ({row.get('remote')})" if share else "all resident"
    if row.get("figure") == "prediction":
        place = f"{row.get('hardware')}, remote tier {row.get('remote')}"
    return (
        str(row.get("figure")),
        str(row.get("model")),
        f"{row.get('layers')} of {row.get('model_layers')} layers",
        f"batch {row.get('batch')}"
        + (f", {row.get('prompt')} tokens in, {row.get('new')} out" if generates else ""),
        place,
    )


def _real(row: Mapping[str, Any]) -> bool:
    return row.get("kind") == "real peer" and row.get("status") == "ok"


def _time(row: Mapping[str, Any]) -> float | None:
    found = row.get("tpot_ms", row.get("ttft_ms"))
    return float(found) if isinstance(found, int | float) else None


def _line(row: Mapping[str, Any], *, marked: bool) -> list[object]:
    status = str(row.get("status"))
    told = [str(row[name]) for name in ("reason", "note") if row.get(name)]
    methods = {str(row[n]) for n in ("tpot_method",) if row.get(n)}
    told += [method for method in methods if method != "CUDA graph replays"]
    rate = row.get("bandwidth")
    realised = row.get("realised")
    compiled = number(row.get("compile_seconds"))
    if row.get("compile_cold") is False and compiled not in ("", "0"):
        told.append("compiled with warm caches")
    decodes = row.get("tpot_ms") is not None
    best = "ok" if marked else ""
    return [
        str(row.get("provider")),
        cell(row.get("kind"), ""),
        cell(status, "ok" if status == "ok" else "bad"),
        f"{realised:.1%}" if isinstance(realised, int | float) else "",
        cell(number(row.get("ttft_ms")), "" if decodes else best),
        number(row.get("ttft_calls_ms")),
        number(row.get("ttft T/L")),
        cell(number(row.get("tpot_ms")), best if decodes else ""),
        number(row.get("tpot T/L")),
        number(row.get("tokens_per_second")),
        number(rate / 1e9) if isinstance(rate, int | float) else "",
        *(
            _bytes(row.get(name))
            for name in ("remote_bytes", "local_bytes_per_token",
    "remote_bytes_per_token",
                         "card_peak_bytes", "host_peak_bytes")
        ),
        compiled,
        cell("\n".join(told)[:300], "note"),
    ]  # fmt: skip


def _bytes(value: object) -> str:
    """Nothing for no number, and for a peak that no sample saw. A peer that realises a little more
    than was asked for has none left."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not value:
        return ""
    return bytes_text(max(value, 0))
