"""A trace of `dak.trace` or `dak plan --trace` on a page: what ran when, and how long each lane was
busy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dak_inductor.quantity_text import seconds_text
from dak_inductor.report.html import Html, join, table, tag
from dak_inductor.report.strip import Bar, strip

_LANES = (
    ("operator", "op"), ("graph", "calls"), ("direct", "direct"), ("local", "HBM"),
    ("remote", "direct"), ("copy", "copies"), ("staged", "staged"), ("stock", "stock"),
    ("ring", "ring"), ("simulated", "operators"), ("trial", "trials"), ("move", "moves"),
    ("compute", "compute"),
)  # fmt: skip
"""Those of both kinds of traces; a lane that is none of them is not drawn."""

_MOST_MICROSECONDS = 1e15


def trace_view(trace: Mapping[str, Any]) -> Html:
    """A strip for each GPU, the host or graph. Events that are damaged are left out."""
    bars: dict[object, list[Bar]] = {}
    names: dict[object, str] = {}
    events = trace.get("traceEvents")
    for event in events if isinstance(events, list) else ():
        if not isinstance(event, dict) or not isinstance(process := event.get("pid"), int):
            continue
        if event.get("name") == "process_name" and isinstance(event.get("args"), dict):
            names[process] = str(event["args"].get("name", ""))
        start, took = _seconds(event.get("ts")), _seconds(event.get("dur"))
        if event.get("ph") == "X" and start is not None and took is not None:
            bar = Bar(str(event.get("cat", "")), str(event.get("name", "")), start, took)
            bars.setdefault(process, []).append(bar)
    told = trace.get("otherData")
    what = str(told.get("what", "")) if isinstance(told, dict) else ""
    parts = [tag("p", what)]
    for process, found in bars.items():
        name = names.get(process, f"process {process}")
        total = max(bar.start + bar.seconds for bar in found)
        words = f"{seconds_text(total)} from the first to the last"
        parts += [tag("h3", name), strip(found, _LANES, words), _sums(found, total)]
    return join(parts)


def _sums(bars: list[Bar], total: float) -> Html:
    rows = []
    for lane, text in _LANES:
        own = [bar.seconds for bar in bars if bar.lane == lane]
        if own:
            busy = sum(own)
            share = f"{busy / total:.1%}" if total else ""
            rows.append([text, len(own), seconds_text(busy), share])
    return table(("lane", "spans", "time of all", "of the whole"), rows)


def _seconds(microseconds: object) -> float | None:
    if isinstance(microseconds, bool) or not isinstance(microseconds, int | float):
        return None
    return microseconds / 1e6 if 0 <= microseconds < _MOST_MICROSECONDS else None
