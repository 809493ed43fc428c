"""The predicted timeline of a planned step: what HBM, the link and the cores do, op by op.

Operators run one after the other; within one, both memories and the cores start together, and the
slowest of them ends it. That is the cost model's picture of direct reads, no measurement.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dak_inductor.cost_model import local_bandwidth, op_floor
from dak_inductor.hardware import HardwareProfile
from dak_inductor.plan import OpPlan, Plan

LANES = ("operator", "local", "remote", "compute")
_NAMES = {
    "operator": "operators",
    "local": "local reads (HBM)",
    "remote": "remote reads (link, direct)",
    "compute": "compute (cores)",
}
_MICROSECONDS = 1e6


@dataclass(frozen=True, slots=True)
class Span:
    """One lane busy for one operator, in seconds from the start of its graph."""

    graph: str
    lane: str
    label: str
    start: float
    seconds: float
    op: OpPlan


def timeline(
    plan: Plan, profile: HardwareProfile, compute: Mapping[str, float] | None = None
) -> list[Span]:
    """Spans of every graph in order of start; lanes that are idle in an operator have none.

    compute: seconds on the cores by operator. A plan does not hold them; where they are left out,
    compute is shown for the operators that it bounds alone.
    """
    link = profile.link(plan.remote)
    spans: list[Span] = []
    for graph in plan.step_times:
        now, ops = 0.0, _by_operator(plan, graph)
        for uses in ops:
            label = uses[0].module or uses[0].tensor or uses[0].op
            took = sum(use.time for use in uses)
            busy = {
                "operator": took,
                "local": sum(use.local_bytes for use in uses) / local_bandwidth(profile),
                "remote": sum(use.remote_bytes for use in uses) / link.direct_bandwidth,
                "compute": _compute(uses, took, profile, compute),
            }
            for lane in LANES:
                seconds = min(busy[lane], took)
                if seconds > 0:
                    spans.append(Span(graph, lane, label, now, seconds, uses[0]))
            now += took
    return spans


def _by_operator(plan: Plan, graph: str) -> list[list[OpPlan]]:
    """Uses of one operator lie beside each other: keys and values of an attention."""
    groups: dict[str, list[OpPlan]] = {}
    for op in plan.ops:
        if op.graph == graph:
            groups.setdefault(op.op, []).append(op)
    return list(groups.values())


def _compute(
    uses: list[OpPlan], took: float, profile: HardwareProfile, known: Mapping[str, float] | None
) -> float:
    if known is not None:
        return known.get(uses[0].op, 0.0)
    floor = op_floor(uses[0].kind, profile)
    return took - floor if any(u.limit == "compute" for u in uses) else 0.0


def to_trace(
    plan: Plan, profile: HardwareProfile, compute: Mapping[str, float] | None = None
) -> str:
    """The timeline in Chrome's trace event format, which ui.perfetto.dev and chrome://tracing open.

    A process for each graph, a thread for each lane; times are microseconds.
    """
    graphs, events = list(plan.step_times), []
    for number, graph in enumerate(graphs, 1):
        name = f"{graph}: predicted {plan.step_times[graph] * 1e3:.3f} ms on {plan.hardware}"
        events.append(_meta("process_name", number, 0, name))
        for lane, key in enumerate(LANES, 1):
            events.append(_meta("thread_name", number, lane, _NAMES[key]))
            events.append({**_meta("thread_sort_index", number, lane, ""),
                           "args": {"sort_index": lane}})  # fmt: skip
    for span in timeline(plan, profile, compute):
        op = span.op
        events.append(
            {
                "name": span.label,
                "cat": span.lane,
                "ph": "X",
                "pid": graphs.index(span.graph) + 1,
                "tid": LANES.index(span.lane) + 1,
                "ts": span.start * _MICROSECONDS,
                "dur": span.seconds * _MICROSECONDS,
                "args": {
                    "kind": op.kind, "strategy": op.strategy, "rows": op.m,
                    "remote_share": op.remote_share, "local_bytes": op.local_bytes,
                    "remote_bytes": op.remote_bytes, "bound_by": op.limit, "source": op.source,
                },
            }
        )  # fmt: skip
    told = {
        "what": "a prediction of the cost model, not a measurement",
        "hardware": plan.hardware,
        "remote": plan.remote,
        "model": plan.model,
    }
    record = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": told}
    return json.dumps(record, allow_nan=False) + "\n"


def _meta(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
