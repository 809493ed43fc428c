"""The staged path outside of graphs: few parts where the host is slower than the card."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dak_inductor import hardware
from dak_inductor.lowering.linear import ring, ring_calls, ring_plan
from dak_inductor.lowering.linear.problem import LinearProblem
from dak_inductor.lowering.linear.ring_plan import Residency

H200 = hardware.load("h200")
HOST, PEER = H200.link("cpu"), H200.link("cuda:1")
BF16 = torch.bfloat16


def all_remote(m: int, n: int, k: int) -> tuple[LinearProblem, tuple[Residency, ...]]:
    return LinearProblem(m, n, k, BF16), (Residency(0, 0),)


@pytest.mark.parametrize(("n", "k"), [(1024, 1024), (4096, 1024), (1024, 4096)])
def test_small_products_take_few_parts_on_one_queue(n: int, k: int) -> None:
    problem, residency = all_remote(8192, n, k)
    graph = ring_plan.choose(problem, residency, H200, HOST)
    call = ring_calls.choose_for_calls(problem, residency, H200, HOST)
    assert len(graph.parts) > 2 and not graph.in_line
    assert call.in_line == (n == k) and len(call.parts) <= 2 and sum(call.slots) == n
    assert ring_calls.call_seconds(call) < ring_calls.call_seconds(graph)


def test_products_between_take_fewer_parts_beside_each_other() -> None:
    problem, residency = all_remote(8192, 4096, 4096)
    graph = ring_plan.choose(problem, residency, H200, HOST)
    call = ring_calls.choose_for_calls(problem, residency, H200, HOST)
    assert 1 < len(call.parts) < len(graph.parts) and not call.in_line
    assert graph.seconds < call.seconds < ring_calls.host_seconds(graph)


@pytest.mark.parametrize(("n", "k"), [(28672, 8192), (14336, 4096)])
def test_large_products_are_planned_for_the_card(n: int, k: int) -> None:
    problem, residency = all_remote(8192, n, k)
    graph = ring_plan.choose(problem, residency, H200, HOST)
    assert ring_calls.choose_for_calls(problem, residency, H200, HOST) == graph


def test_what_the_ring_cannot_hold_whole_stays_in_parts() -> None:
    k = 16384
    problem, residency = all_remote(129, ring_plan.RING_BYTES // (2 * k) + 8, k)
    assert not ring_calls.choose_for_calls(problem, residency, H200, HOST).in_line


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_parts_cover_each_feature_once_and_fit_the_ring(data: st.DataObject) -> None:
    gated, in_out = data.draw(st.booleans()), data.draw(st.booleans())
    n, k = data.draw(st.integers(1, 5000)), data.draw(st.sampled_from([8, 520, 4096]))
    problem = LinearProblem(data.draw(st.integers(129, 9000)), n, k, BF16, gated, in_out)
    rows = k if in_out else n
    local = [data.draw(st.integers(0, rows)) for _ in range(1 + gated)]
    residency = tuple(Residency(each, min(rows, each + 1)) for each in local)
    link = data.draw(st.sampled_from([HOST, PEER]))
    plan = ring_calls.choose_for_calls(problem, residency, H200, link)
    graph = ring_plan.choose(problem, residency, H200, link)
    assert ring_calls.call_seconds(plan) <= ring_calls.call_seconds(graph)
    for weight, where in enumerate(residency):
        parts = sorted((p for p in plan.parts if p.weight == weight), key=lambda p: p.start)
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
        assert parts[-1].stop == n
        assert all(p.staged or where.local >= (k if in_out else p.stop) for p in parts)
        assert all(part.start % ring_plan.LEAST_FEATURES == 0 for part in parts)
    if plan.in_line:
        assert plan.slots == tuple(part.features for part in plan.staged)
        assert sum(plan.slots) * k * 2 <= ring_plan.RING_BYTES


def test_a_graph_and_a_call_of_one_product_have_plans_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem, residency = all_remote(8192, 1024, 1024)
    monkeypatch.setattr(ring, "profile_of", lambda index: H200)
    ring.plan_of.cache_clear()
    try:
        plans = {
            in_graph: ring.plan_of(problem, residency, 0, frozenset({"cpu"}), in_graph=in_graph)
            for in_graph in (False, True)
        }
    finally:
        ring.plan_of.cache_clear()
    assert plans[False].in_line and not plans[True].in_line
