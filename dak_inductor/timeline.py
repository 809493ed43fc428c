"""The predicted timeline of a planned step: what HBM, the link and the cores do, op by op.

Operators run one after the other; within one, both memories and the cores start together, and the
slowest of them ends it. Remote rows that are copied ahead come before, one copy after the other, as
soon as the ring has room; an operator does not end before its copies. That is the cost model's
picture, no measurement.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from dak_inductor.copy_ring import PARTS_IN_RING, RING_BYTES
from dak_inductor.cost_model import local_bandwidth, op_floor
from dak_inductor.hardware_profile import HardwareProfile
from dak_inductor.plan import OpPlan, Plan
from dak_inductor.trace_labels import process_name, thread_name, thread_position

LANES = ("operator", "local", "remote", "copy", "compute")
_NAMES = {
    "operator": "operators",
    "local": "local reads (HBM)",
    "remote": "remote reads (link, direct)",
    "copy": "copies ahead (link, staged)",
    "compute": "compute (cores)",
}
_MICROSECONDS = 1e6
_PART_BYTES = RING_BYTES / PARTS_IN_RING


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
    """Spans of every graph, operator by operator; lanes that are idle in one have none there.

    compute: seconds on the cores by operator. A plan does not hold them; where they are left out,
    compute is shown for the operators that it bounds alone.
    """
    link = profile.link(plan.remote)
    spans: list[Span] = []
    for graph in plan.step_times:
        now, copies = 0.0, _Copies(link.copy_bandwidth)
        for uses in _by_operator(plan, graph):
            label, took = uses[0].module or uses[0].tensor or uses[0].op, sum(u.time for u in uses)
            copied = sum(use.remote_bytes for use in uses if use.strategy == "staged")
            if copied:
                start, end = copies.queue(copied)
                spans.append(Span(graph, "copy", label, start, end - start, uses[0]))
                took = max(took, end - now)
                copies.read_until(now + took, copied)
            direct = sum(use.remote_bytes for use in uses) - copied
            local = sum(use.local_bytes for use in uses) + copied  # copied rows are read there too
            busy = {
                "operator": took,
                "local": local / local_bandwidth(profile),
                "remote": direct / link.direct_bandwidth,
                "compute": _compute(uses, took, profile, compute),
            }
            for lane, seconds in busy.items():
                if min(seconds, took) > 0:
                    spans.append(Span(graph, lane, label, now, min(seconds, took), uses[0]))
            now += took
    return spans


class _Copies:
    """One copy after the other on a link, into a ring that readers give back as they end: larger
    copies come in parts, of which one has to have room."""

    def __init__(self, bandwidth: float) -> None:
        self._bandwidth = bandwidth
        self._free_at = self._held = 0.0
        self._readers: deque[tuple[float, float]] = deque()

    def queue(self, nbytes: float) -> tuple[float, float]:
        """When a copy begins and ends."""
        start = self._free_at
        while self._readers and self._held + min(nbytes, _PART_BYTES) > RING_BYTES:
            given_back, part = self._readers.popleft()
            start, self._held = max(start, given_back), self._held - part
        self._free_at = start + nbytes / self._bandwidth
        return start, self._free_at

    def read_until(self, end: float, nbytes: float) -> None:
        """The last copy's reader ends then."""
        part = min(nbytes, _PART_BYTES)
        self._readers.append((end, part))
        self._held += part


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
        events.append(process_name(number, name))
        for lane, key in enumerate(LANES, 1):
            events.append(thread_name(number, lane, _NAMES[key]))
            events.append(thread_position(number, lane))
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
