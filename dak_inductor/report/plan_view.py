"""A plan on a page: per-operator tables, refusals, and the predicted timeline of each step."""

from __future__ import annotations

from collections.abc import Sequence

from dak_inductor import hardware
from dak_inductor.errors import DakError
from dak_inductor.plan import Plan
from dak_inductor.plan_report import OpGroup, OpSeconds, bytes_text, group_ops, seconds_text
from dak_inductor.refusal import Refusal
from dak_inductor.report.html import Html, cell, details, join, table, tag
from dak_inductor.timeline import LANES, Span, timeline

MOST_SPANS = 600
"""Of one graph in the picture, the longest ones: more are thinner than a pixel."""
_LANE_TEXT = {"operator": "op", "local": "HBM", "remote": "link", "compute": "cores"}


def plan_view(plan: Plan, measured: OpSeconds | None = None) -> Html:
    """What goes where and what it costs: sums, one table for each graph, refusals, timelines."""
    total = plan.total_bytes
    share = plan.remote_bytes / total if total else 0.0
    words = (
        f"{plan.model or 'model'} on {plan.hardware}, remote tier {plan.remote}: "
        f"{bytes_text(plan.remote_bytes)} of {bytes_text(total)} remote ({share:.1%}). "
        "Times are predictions of the cost model"
        + ("; measured ones are of trials, by the way that was taken." if measured else ".")
    )
    parts = [tag("p", words)]
    for graph in plan.step_times:
        parts += [graph_view(plan, graph, measured or {})]
    parts += [refusals(plan.refusals)]
    return join(parts)


def graph_view(plan: Plan, graph: str, measured: OpSeconds) -> Html:
    """Equal layers in one row; every operator, with its source line, folded away."""
    step, bound = plan.step_times[graph], plan.bound.get(graph, 0.0)
    over = f", {step / bound:.2f}x of its bound" if bound else ""
    ops = [op for op in plan.ops if op.graph == graph]
    layers = group_ops(ops, measured=measured)
    every = group_ops(ops, all_ops=True, measured=measured)
    return join([
        tag("h3", f"{graph}: {seconds_text(step)} predicted{over}"),
        _picture(plan, graph),
        _groups(layers, step),
        details(f"all {len(ops)} operators", _groups(every, step)),
    ])  # fmt: skip


def _groups(groups: Sequence[OpGroup], step: float) -> Html:
    timed = any(group.measured is not None for group in groups)
    headings = ("operator", "kind", "source", "count", "rows", "remote", "share", "HBM", "link",
                "time", *(["measured"] if timed else []), "bound by")  # fmt: skip
    rows = []
    for group in groups:
        low, high = group.lowest_share, group.highest_share
        share = f"{low:.1%}" if low == high else f"{low * 100:.1f}-{high:.1%}"
        rows.append(
            [
                group.label,
                cell(group.kind, ""),
                cell(group.source, "note"),
                group.count,
                group.m or "",
                _bar(high, share),
                f"{group.time / step:.1%}" if step else "",
                bytes_text(group.local_bytes),
                bytes_text(group.remote_bytes),
                seconds_text(group.time),
                *([_seconds(group.measured)] if timed else []),
                cell(group.limits, ""),
            ]
        )
    return table(headings, rows, numbers=range(3, 11 if timed else 10))


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
    words = f"not offloaded: {len(found)} operators"
    return details(words, table(headings, rows, numbers=range(4, 5)))


def _picture(plan: Plan, graph: str) -> Html:
    """The timeline as a strip for each lane; nothing where the profile is not at hand."""
    try:
        spans = [s for s in timeline(plan, hardware.load(plan.hardware)) if s.graph == graph]
    except DakError:
        return Html("")
    total = plan.step_times[graph]
    if not spans or not total:
        return Html("")
    shown = sorted(spans, key=lambda span: -span.seconds)[:MOST_SPANS]
    width, height, left = 1000, 24, 52
    lanes = [lane for lane in LANES if any(span.lane == lane for span in shown)]
    parts: list[Html] = []
    for row, lane in enumerate(lanes):
        y = row * height
        parts.append(tag("text", _LANE_TEXT[lane], x=0, y=y + 16))
        parts += [_rectangle(s, total, left, width, y) for s in shown if s.lane == lane]
    picture = tag(
        "svg", *parts, viewBox=f"0 0 {left + width} {height * len(lanes)}", class_="strip",
        role="img",
    )  # fmt: skip
    words = f"predicted timeline of {graph}, {seconds_text(total)}"
    if len(spans) > len(shown):
        words += f"; the {len(shown)} longest of {len(spans)} spans"
    return tag("figure", tag("div", picture, class_="scroll"), tag("figcaption", words))


def _rectangle(span: Span, total: float, left: int, width: int, y: int) -> Html:
    told = f"{span.label}: {seconds_text(span.seconds)} at {seconds_text(span.start)}"
    return tag(
        "rect",
        tag("title", told),
        x=f"{left + span.start / total * width:.2f}",
        y=y + 3,
        width=f"{max(span.seconds / total * width, 0.3):.2f}",
        height=18,
        class_=f"lane-{span.lane}",
    )
