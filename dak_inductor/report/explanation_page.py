"""`dak.explain(model).to_html()`: placement, kernels, reasons and predictions on one page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dak_inductor.ahead_report import COLUMNS, StepStrategy, rows_of
from dak_inductor.memory_curve import MemoryPoint
from dak_inductor.quantity_text import bytes_text, count_text, seconds_text
from dak_inductor.report.document import page
from dak_inductor.report.html import Html, cell, details, join, table, tag
from dak_inductor.report.plan_view import plan_view
from dak_inductor.report.window_history import window_history
from dak_inductor.template_report import OpTemplate

if TYPE_CHECKING:
    from dak_inductor.explain import Explanation


def explanation_page(found: Explanation, title: str) -> str:
    """The whole document; `title` is the sentence that the text begins with."""
    parts = [
        tag("p", title),
        _tiers(found),
        _memory(found.curve),
        tag("h2", "Operators"),
        plan_view(found.plan, found.notes),
        _kernels(found.templates),
        _ahead(found.strategies),
        _trials(found),
        tag("p", str(found.window)) if found.window else Html(""),
        window_history("link", found.window_history),
    ]
    return page("dak.explain", *parts)


def _tiers(found: Explanation) -> Html:
    """Sums by tier."""
    rows = [
        ["divided weights", bytes_text(found.placed.local), bytes_text(found.placed.remote)],
        ["kept whole", bytes_text(found.resident_bytes), ""],
    ]
    if found.caches.total:
        caches = found.caches
        rows.append(["KV cache, full", bytes_text(caches.local), bytes_text(caches.remote)])
    return table(("bytes", found.device, found.remote), rows)


def _memory(curve: Sequence[MemoryPoint]) -> Html:
    """What more GPU memory would buy."""
    if not curve:
        return Html("")
    graphs = list(curve[0].step_times)
    rows = [
        [
            f"+{bytes_text(point.more_bytes)}" if point.more_bytes else "as it is",
            bytes_text(point.remote_bytes),
            *(seconds_text(point.step_times[graph]) for graph in graphs),
        ]
        for point in curve
    ]
    headings = ("GPU memory", "remote", *graphs)
    return join([tag("h2", "What more GPU memory would buy"), table(headings, rows)])


def _kernels(templates: Sequence[OpTemplate]) -> Html:
    """What serves each operator, what is fused into it, and why a faster template does not."""
    if not templates:
        return Html("")
    rows = [
        [op.graph, *(cell(text, "") for text in (op.module or op.op, op.kind, op.epilogue)),
         cell(op.template, ""), cell(op.reasons, "note")]
        for op in templates
    ]  # fmt: skip
    headings = ("graph", "operator", "kind", "fused", "served by", "reasons")
    served: dict[str, int] = {}
    for op in templates:
        served[op.template] = served.get(op.template, 0) + 1
    sums = ", ".join(f"{count} by {name}" for name, count in served.items())
    return join(
        [
            tag("h2", "Kernels"),
            tag("p", f"{count_text(len(templates), 'operator')}: {sums}"),
            details("each operator", table(headings, rows, numbers=range(0))),
        ]
    )


def _ahead(steps: Sequence[StepStrategy]) -> Html:
    """Which products of each step are copied ahead, and why the others are not."""
    if not steps:
        return Html("")
    parts: list[Html] = [tag("h2", "Copied ahead")]
    for step in steps:
        rows = [
            [weights, cell(strategy, "ok" if strategy == "staged" else ""), cell(why, "note"), n]
            for (weights, strategy, why), n in rows_of(step).items()
        ]
        parts.append(tag("p", str(step)))
        parts.append(table(COLUMNS, rows, numbers=range(3, 4)) if rows else Html(""))
    return join(parts)


def _trials(found: Explanation) -> Html:
    """Products that were timed at their first call."""
    if not found.trials:
        return Html("")
    rows = [[str(t.call), cell(t.times, "note"), cell(t.taken, "")] for t in found.trials]
    headings = ("product", "measured", "taken")
    return details("products measured", table(headings, rows, numbers=range(0)))
