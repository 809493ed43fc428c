"""What records conclude, as Markdown: a line for each bar, for each step, for each model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dak_inductor.benchmarks.harness.cause_tables import markdown
from dak_inductor.report.peer_ratios import PHASES, PeerRatio, peer_ratios

WORDS = {True: "met", False: "**missed**", None: "open"}
_UNITS = {"B/s": (1e-9, " GB/s"), "s": (1e3, " ms"), "B": (1.0, " B")}
_PLANNER_BARS = {
    "planning_below_50_ms": "planning 2,000 operators, best of 5, below 50 ms",
    "optimum_before_rounding": "plan before rounding: the LP optimum",
    "within_0.1_percent_after_rounding": "plan after rounding: within 0.1% of it",
    "within_a_page_per_moved_tensor": "plan by moves: within a page per moved tensor",
}


def bars(results: Path, names: Sequence[str]) -> str:
    """Every verdict of these records."""
    rows: list[Sequence[str]] = []
    for name in names:
        record = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        where = f"`{name}.json`"
        if "verdicts" not in record:
            rows += [
                [_PLANNER_BARS[bar], "-", "-", WORDS[passed], "", where]
                for bar, passed in record["bars"].items()
            ]
        for verdict in record.get("verdicts", ()):
            rows.append(
                [
                    verdict["name"], _figure(verdict["measured"], verdict["unit"]),
                    _figure(verdict["bar"], verdict["unit"]), WORDS[verdict["passed"]],
                    verdict["note"], where,
                ]
            )  # fmt: skip
    return markdown(("bar", "measured", "wanted", "verdict", "note", "record"), rows)


def steps(results: Path, names: Sequence[str]) -> str:
    """What each step took, beside the others and the copy engine's time for the remote bytes."""
    rows = [
        [
            name, f"{100 * cell['fraction']:g}", cell["provider"], cell["kind"],
            f"{cell['milliseconds']:.3f}", f"{cell['T/L']:.3f}",
            f"{cell['milliseconds'] - cell['L_milliseconds']:.3f}", cell["note"],
        ]
        for name in names
        for cell in _measured(results / f"{name}.json")
    ]  # fmt: skip
    head = ("record", "% remote", "provider", "kind", "T, ms", "T / L", "T - L, ms", "note")
    return markdown(head, rows)


def models(results: Path, names: Sequence[str]) -> str:
    """Whole models: time over that of the fastest real peer, by share remote."""
    cells = {
        name: json.loads((results / f"{name}.json").read_text(encoding="utf-8"))["cells"]
        for name in names
    }
    shares = sorted({cell["share"] for rows in cells.values() for cell in rows if cell["share"]})
    head = ("step", "model", *(f"{share:.0%} remote" for share in shares), "record")
    rows = [
        [title, line, *(_ratio(at.get(share)) for share in shares), f"`{name}.json`"]
        for phase, title in PHASES.items()
        for name, of_name in cells.items()
        for line, at in peer_ratios(of_name, phase).items()
    ]
    return markdown(head, rows)


def _ratio(found: PeerRatio | None) -> str:
    if found is None:
        return "-"
    text = f"{found.ratio:.2f}x"
    return f"**{text}** ({found.peer})" if found.ratio > 1 else text


def _measured(path: Path) -> Iterator[Mapping[str, Any]]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    yield from sorted(
        (cell for cell in cells if cell["status"] == "ok"),
        key=lambda cell: (cell["fraction"], cell["milliseconds"]),
    )


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    scale, text = _UNITS.get(unit, (1.0, f" {unit}" if unit else ""))
    scaled = value * scale
    return f"{scaled:.0f}{text}" if float(scaled).is_integer() else f"{scaled:.4g}{text}"
