"""The predicted timeline of a plan, and its trace file."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest

from dak_inductor import hardware
from dak_inductor.plan import OpUse, Plan, PlanProblem, TensorSpec
from dak_inductor.planner import make_plan
from dak_inductor.timeline import timeline, to_trace

H200 = hardware.load("h200")


@pytest.fixture
def plan() -> Plan:
    size = 100 << 20
    uses = tuple(
        OpUse(f"{graph}{i}", graph, f"w{i}", "linear", size, 1e5, flops, 1.0, module=f"layers.{i}")
        for graph, flops in (("prefill", 4e12), ("decode", 1e8))
        for i in range(3)
    )
    keys = OpUse("decode9", "decode", "w0", "attention", 1e6, 0.0, 1e6, 1.0)
    uses = (*uses, keys, replace(keys, tensor="w1"))
    tensors = tuple(TensorSpec(f"w{i}", size) for i in range(3))
    return make_plan(PlanProblem(tensors, uses, 150 << 20, "cpu"), H200)


def test_spans_fill_the_step_and_lanes_end_within_their_operator(plan: Plan) -> None:
    spans = timeline(plan, H200)
    for graph, step in plan.step_times.items():
        own = [span for span in spans if span.graph == graph]
        operators = [span for span in own if span.lane == "operator"]
        assert sum(span.seconds for span in operators) == pytest.approx(step, rel=1e-3)
        for before, after in itertools.pairwise(operators):
            assert after.start == pytest.approx(before.start + before.seconds)
        ends = {span.start: span.start + span.seconds for span in operators}
        assert all(s.start + s.seconds <= ends[s.start] * (1 + 1e-9) for s in own)


def test_link_is_busy_for_the_remote_bytes(plan: Plan) -> None:
    decode = [s for s in timeline(plan, H200) if s.graph == "decode" and s.lane == "remote"]
    remote = sum(op.remote_bytes for op in plan.ops if op.graph == "decode")
    link = H200.link("cpu").direct_bandwidth
    assert remote > 0
    assert sum(span.seconds for span in decode) == pytest.approx(remote / link, rel=1e-6)


@pytest.mark.parametrize("remote", [8, 150])
def test_what_is_copied_ahead_is_a_lane_of_its_own(remote: int) -> None:
    """8 MiB hide behind HBM; of 150 the link is the bottleneck, and each product waits for it."""
    size, rows = 100 << 20, 64 * 8192 * 2
    uses = tuple(
        OpUse(f"p{i}", "decode", f"layers.{i}.w", "linear", size, 1e5, 1e8, 1.0, m=1)
        for i in range(8)
    )
    tensors = tuple(TensorSpec(f"layers.{i}.w", size, row_block=rows) for i in range(8))
    problem = PlanProblem(tensors, uses, remote << 20, "cpu", ring_bytes=64 << 20)
    plan = make_plan(problem, H200)
    copied = {op.op: op.remote_bytes for op in plan.ops if op.strategy == "staged"}
    spans = timeline(plan, H200)
    copies = [span for span in spans if span.lane == "copy"]
    assert copied.keys() == {span.op.op for span in copies}
    bandwidth = H200.link("cpu").copy_bandwidth
    assert sum(copied.values()) >= remote << 20
    assert sum(s.seconds for s in copies) == pytest.approx(sum(copied.values()) / bandwidth)
    for before, after in itertools.pairwise(copies):
        assert after.start >= before.start + before.seconds
    ends = {s.op.op: s.start + s.seconds for s in spans if s.lane == "operator"}
    assert all(s.start + s.seconds <= ends[s.op.op] * (1 + 1e-9) for s in copies)
    late = max(ends.values()) - plan.step_times["decode"]
    assert -1e-9 <= late <= copies[0].seconds + 1e-9, "the first copy has nothing to hide behind"
    assert not [s for s in spans if s.lane == "remote"], "no byte of it is read in place"


def test_compute_is_that_of_the_uses_or_of_what_it_bounds(plan: Plan) -> None:
    def lane(spans: list[object]) -> list[str]:
        return [s.op.op for s in spans if s.lane == "compute"]  # type: ignore[attr-defined]

    assert lane([*timeline(plan, H200)]) == ["prefill0", "prefill1", "prefill2"]
    assert lane([*timeline(plan, H200, {"decode1": 1e-6})]) == ["decode1"]


def test_trace_is_what_perfetto_reads(plan: Plan) -> None:
    trace = json.loads(to_trace(plan, H200))
    events = trace["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert any("link" in name for name in names) and any("HBM" in name for name in names)
    spans = [e for e in events if e["ph"] == "X"]
    assert {e["pid"] for e in spans} == {1, 2}
    assert all(e["dur"] > 0 and e["ts"] >= 0 and e["name"] for e in spans)
    assert "prediction" in trace["otherData"]["what"]
