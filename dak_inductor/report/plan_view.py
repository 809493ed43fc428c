"""A plan on a page: per-operator tables, refusals, and the predicted timeline of each step."""

from __future__ import annotations

from collections.abc import Sequence

from dak_inductor import hardware
from dak_inductor.errors import DakError
from dak_inductor.op_notes import OpNotes
from dak_inductor.plan import Plan
from dak_inductor.plan_report import OpGroup, group_ops
from dak_inductor.quantity_text import bytes_text, count_text, seconds_text
from dak_inductor.refusal import Refusal
from dak_inductor.report.html import Html, cell, details, join, table, tag
from dak_inductor.report.strip import Bar, strip
from dak_inductor.timeline import LANES, timeline

_LANE_TEXT = {
    "operator": "op", "local": "HBM", "remote": "direct", "copy": "copies", "compute": "cores",
}  # fmt: skip


def plan_view(plan: Plan, notes: OpNotes | None = None) -> Html:
    """What goes where and what it costs: sums, one table for each graph, refusals, timelines."""
    notes, total = notes or _planned(plan), plan.total_bytes
    share = plan.remote_bytes / total if total else 0.0
    words = (
        f"{plan.model or 'model'} on {plan.hardware}, remote tier {plan.remote}: "
        f"{bytes_text(plan.remote_bytes)} of {bytes_text(total)} remote ({share:.1%}). "
        "Times are predictions of the cost model"
        + ("; measured ones are of trials, by the way that was taken." if notes.seconds else ".")
    )
    parts = [tag("p", words)]
    for graph in plan.step_times:
        parts += [graph_view(plan, graph, notes)]
    parts += [refusals(plan.refusals)]
    return join(parts)


def _planned(plan: Plan) -> OpNotes:
    """Of a plan that nothing has run yet."""
    remote = (op for op in plan.ops if op.remote_share)
    return OpNotes(strategies={(op.graph, op.op): op.strategy for op in remote})


def graph_view(plan: Plan, graph: str, notes: OpNotes) -> Html:
    """Equal layers in one row; every operator, with its source line, folded away."""
    step, bound = plan.step_times[graph], plan.bound.get(graph, 0.0)
    over = f", {step / bound:.2f}x of its bound" if bound else ""
    ops = [op for op in plan.ops if op.graph == graph]
    layers = group_ops(ops, notes=notes)
    every = group_ops(ops, all_ops=True, notes=notes)
    return join([
        tag("h3", f"{graph}: {seconds_text(step)} predicted{over}"),
        _picture(plan, graph),
        _groups(layers, step),
        details(f"all {count_text(len(ops), 'operator')}", _groups(every, step)),
    ])  # fmt: skip


def _groups(groups: Sequence[OpGroup], step: float) -> Html:
    timed = any(group.measured is not None for group in groups)
    served = any(group.kernels for group in groups)
    headings = ("operator", "kind", "count", "rows", "remote", "share", "HBM", "link",
                "time", *(["measured"] if timed else []), "bound by", "strategy",
                *(["kernel"] if served else []), "source")  # fmt: skip
    rows = []
    for group in groups:
        low, high = group.lowest_share, group.highest_share
        share = f"{low:.1%}" if low == high else f"{low * 100:.1f}-{high:.1%}"
        rows.append(
            [
                group.label,
                cell(group.kind, ""),
                group.count,
                group.m or "",
                _bar(_share(group), share),
                f"{group.time / step:.1%}" if step else "",
                bytes_text(group.local_bytes),
                bytes_text(group.remote_bytes),
                seconds_text(group.time),
                *([_seconds(group.measured)] if timed else []),
                cell(group.limits, ""),
                cell(group.strategies, ""),
                *([cell(group.kernels, "")] if served else []),
                cell(group.source, ""),
            ]
        )
    return table(headings, rows, numbers=range(2, 10 if timed else 9))


def _share(group: OpGroup) -> float:
    """Of all bytes that the group reads."""
    read = group.local_bytes + group.remote_bytes
    return group.remote_bytes / read if read else 0.0


def _seconds(known: float | None) -> str:
    return "" if known is None else seconds_text(known)


def _bar(share: float, text: str) -> Html:
    """A cell with the share as a bar behind its text."""
    width = f"width:{min(max(share, 0), 1) * 100:.1f}%"
    return cell(tag("span", tag("i", style=width), text, class_="share"), "n")


def refusals(found: Sequence[Refusal]) -> Html:
    """Operators that are not offloaded, each kind once with its reason."""
    if not found:
        return Html("")
    counts: dict[tuple[str, str, str, str], int] = {}
    for refusal in found:
        place = refusal.module or refusal.node
        key = (refusal.target, place, refusal.source.rsplit("/", 1)[-1], refusal.reason)
        counts[key] = counts.get(key, 0) + 1
    rows = [
        [target, cell(place, ""), cell(source, "note"), cell(reason, "note"), count]
        for (target, place, source, reason), count in counts.items()
    ]
    headings = ("operator", "where", "source", "reason", "count")
    words = f"not offloaded: {count_text(len(found), 'operator')}"
    return details(words, table(headings, rows, numbers=range(4, 5)))


def _picture(plan: Plan, graph: str) -> Html:
    """The timeline; nothing where the profile is not at hand."""
    try:
        spans = [s for s in timeline(plan, hardware.load(plan.hardware)) if s.graph == graph]
    except DakError:
        return Html("")
    bars = [Bar(span.lane, span.label, span.start, span.seconds) for span in spans]
    lanes = [(lane, _LANE_TEXT[lane]) for lane in LANES]
    step = seconds_text(plan.step_times[graph])
    return strip(bars, lanes, f"predicted timeline of {graph}, {step}")
