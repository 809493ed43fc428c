"""The plan of the staged path: which parts go through the ring, in what order, how long."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dak_inductor import hardware
from dak_inductor.lowering.copy_cost import piece_overhead
from dak_inductor.lowering.linear import ring_plan
from dak_inductor.lowering.linear.problem import LinearProblem
from dak_inductor.lowering.linear.ring_plan import Residency
from dak_inductor.lowering.linear.ring_timing import multiply_seconds
from dak_inductor.lowering.slots import MOST_SLOTS

H200 = hardware.load("h200")
HOST, PEER = H200.link("cpu"), H200.link("cuda:1")
SUSTAINED = 0.89 * H200.matmul_flops["bfloat16"]
WHOLE_RING = ring_plan.RING_BYTES
LARGE_RING = ring_plan.LARGE_RING * WHOLE_RING
BF16 = torch.bfloat16


@st.composite
def planned(draw: st.DrawFn):
    """A problem, where its weights lie, and the plan for it."""
    gated, in_out = draw(st.booleans()), draw(st.booleans())
    m = draw(st.sampled_from([129, 512, 4097, 8192, 20000]))
    n = draw(st.integers(1, 5000)) * draw(st.sampled_from([1, 8]))
    k = draw(st.sampled_from([8, 520, 4096, 8192, 28672, 1 << 20]))
    problem = LinearProblem(m, n, k, BF16, gated, in_out)
    rows = k if in_out else n
    residency = []
    for _ in range(1 + gated):
        local = draw(st.integers(0, rows))
        residency.append(Residency(local, min(rows, local + draw(st.integers(0, 1)))))
    link = draw(st.sampled_from([HOST, PEER]))
    where = tuple(residency)
    return problem, where, ring_plan.choose(problem, where, H200, link)


@settings(deadline=None, max_examples=150)
@given(planned())
def test_parts_cover_each_feature_once_and_fit_the_ring(found) -> None:
    problem, residency, plan = found
    for weight, where in enumerate(residency):
        covered = sorted((part.start, part.stop) for part in plan.parts if part.weight == weight)
        ends = [0, *(stop for _, stop in covered)]
        assert [start for start, _ in covered] == ends[:-1] and ends[-1] == problem.n
        for part in plan.parts:
            if part.weight != weight:
                continue
            needed = problem.k if problem.in_out else part.stop
            assert part.staged or where.local >= needed, "remote rows multiplied in place"
            assert part.start % ring_plan.LEAST_FEATURES == 0, "an output off 16 bytes"
            copied = where.local - part.start
            assert not part.staged or problem.in_out or copied < ring_plan.UNIT
    for position, part in enumerate(plan.staged):
        assert part.features <= plan.slots[position % len(plan.slots)]
    assert len(plan.slots) <= min(len(plan.staged), MOST_SLOTS)
    assert bool(plan.slots) == bool(plan.staged)
    assert sum(plan.slots) * problem.k * 2 <= LARGE_RING
    assert len(plan.slots) > 1 or len(plan.staged) <= 1, "copies and products take turns"
    assert plan.seconds > 0


def test_nothing_remote_is_one_product_for_each_weight() -> None:
    for gated in (False, True):
        problem = LinearProblem(8192, 4096, 4096, BF16, gated)
        residency = ring_plan.residencies(problem, (0,) * (1 + gated))
        plan = ring_plan.choose(problem, residency, H200, HOST)
        assert [part.features for part in plan.parts] == [4096] * (1 + gated)
        assert plan.slots == () and not plan.staged


def test_all_remote_multiplies_nothing_in_place() -> None:
    problem = LinearProblem(8192, 28672, 8192, BF16)
    plan = ring_plan.choose(problem, (Residency(0, 0),), H200, HOST)
    assert all(part.staged for part in plan.parts)
    assert all(part.start % 256 == 0 for part in plan.parts)


def test_few_local_rows_are_copied_with_the_rest() -> None:
    problem = LinearProblem(8192, 4096, 4096, BF16)
    for local, start in ((1007, 1000), (1000, 1000), (255, 0)):
        plan = ring_plan.choose(problem, (Residency(local, local + 1),), H200, HOST)
        assert min(part.start for part in plan.staged) == start


def test_copies_never_wait_for_a_slot_where_the_ring_holds_them_all() -> None:
    for m in (256, 2048, 8192):
        problem = LinearProblem(m, 28672, 8192, BF16)
        for remote in (2 << 20, 47 << 20, WHOLE_RING):
            residency = ring_plan.residencies(problem, (remote,))
            plan = ring_plan.choose(problem, residency, H200, HOST)
            assert len(plan.slots) == len(plan.staged)


def test_copies_behind_local_work_are_one_product_more() -> None:
    problem = LinearProblem(2048, 28672, 8192, BF16)
    plan = ring_plan.choose(problem, ring_plan.residencies(problem, (47 << 20,)), H200, HOST)
    assert len(plan.staged) == 1 and not plan.copy_bound


def test_behind_the_last_copy_a_small_product_is_left() -> None:
    for m in (512, 1024):
        problem = LinearProblem(m, 28672, 8192, BF16)
        plan = ring_plan.choose(problem, ring_plan.residencies(problem, (47 << 20,)), H200, HOST)
        assert plan.copy_bound and plan.staged[-1].features <= ring_plan.UNIT
        copies = (47 << 20) / HOST.copy_bandwidth
        assert copies < plan.seconds < 1.05 * copies


def test_local_work_comes_in_blocks_where_the_ring_is_too_small_for_all_copies() -> None:
    problem = LinearProblem(4352, 28672, 8192, BF16)
    residency = ring_plan.residencies(problem, (round(0.3 * problem.weight_bytes),))
    plan = ring_plan.choose(problem, residency, H200, HOST)
    staged = [part.staged for part in plan.parts]
    first = staged.index(True)
    assert len(plan.slots) < len(plan.staged) and not all(staged[first:])


def test_long_rows_take_a_larger_ring_over_a_fast_link_alone() -> None:
    """64 MiB hold 1170 rows of 28672 elements: parts of which two are in it have fewer tiles than
    there are SMs. Over PCIe copies take longer than products in parts of any size."""
    problem = LinearProblem(1024, 8192, 28672, BF16)
    half = ring_plan.residencies(problem, (problem.weight_bytes // 2,))
    for link, most, least in ((PEER, LARGE_RING, WHOLE_RING), (HOST, WHOLE_RING, 0)):
        plan = ring_plan.choose(problem, half, H200, link)
        assert least < sum(plan.slots) * problem.k * 2 <= most
    short = LinearProblem(1024, 57344, 4096, BF16)
    plan = ring_plan.choose(short, (Residency(0, 0),), H200, PEER)
    assert sum(plan.slots) * short.k * 2 <= WHOLE_RING


def test_a_larger_ring_is_taken_only_for_what_it_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = LinearProblem(1024, 8192, 28672, BF16)
    half = ring_plan.residencies(problem, (problem.weight_bytes // 2,))
    large = ring_plan.choose(problem, half, H200, PEER)
    monkeypatch.setattr(ring_plan, "LARGE_RING_SAVES", 1.0)
    small = ring_plan.choose(problem, half, H200, PEER)
    assert sum(small.slots) * problem.k * 2 <= WHOLE_RING
    assert large.seconds < 0.9 * small.seconds


def test_products_run_one_after_the_other() -> None:
    problem = LinearProblem(4096, 28672, 8192, BF16)
    plan = ring_plan.choose(problem, ring_plan.residencies(problem, (47 << 20,)), H200, HOST)
    work = sum(multiply_seconds(problem, part.features, H200) for part in plan.parts)
    assert work < plan.seconds < work + 20e-6


@pytest.mark.parametrize(
    ("n", "k", "measured"),
    [
        (28672, 8192, (195, 355, 672, 1320)),
        (8192, 28672, (198, 377, 723, 1377)),
        (4096, 14336, (57, 94, 175, 344)),
        (6144, 4096, (24, 42, 76, 147)),
        (4096, 4096, (18.5, 29, 51, 97)),
        (7168, 2048, (15, 25, 52, 86)),
    ],
)
def test_estimates_of_whole_products_are_near_what_was_measured(n: int, k: int, measured) -> None:
    for m, microseconds in zip((256, 512, 1024, 2048), measured, strict=True):
        seconds = ring_plan.estimate(LinearProblem(m, n, k, BF16), (0,), H200, HOST)
        assert seconds == pytest.approx(1e-6 * microseconds, rel=0.2 if m == 256 else 0.1)


def test_over_a_fast_link_the_first_chunk_is_small_where_nothing_hides_it() -> None:
    problem = LinearProblem(8192, 28672, 8192, BF16)
    plan = ring_plan.choose(problem, (Residency(0, 0),), H200, PEER)
    assert plan.staged[0].features < max(plan.slots)


def test_copies_that_take_as_long_as_the_products_are_hidden_behind_local_parts() -> None:
    problem = LinearProblem(4352, 28672, 8192, BF16)
    remote = round(0.3 * problem.weight_bytes)
    seconds = ring_plan.estimate(problem, (remote,), H200, HOST)
    bound = max(remote / HOST.copy_bandwidth, problem.flops / SUSTAINED)
    assert bound < seconds < 1.05 * bound


@pytest.mark.parametrize("in_out", [False, True])
@pytest.mark.parametrize("link", [HOST, PEER], ids=["host", "peer"])
def test_the_estimate_lies_between_the_bounds_and_grows_with_the_remote_share(link, in_out) -> None:
    problem = LinearProblem(8192, 28672, 8192, BF16, False, in_out)
    compute = problem.flops / SUSTAINED
    before = 0.0
    for fraction in (0.0, 0.02, 0.1, 0.3, 0.6, 1.0):
        remote = round(fraction * problem.weight_bytes)
        seconds = ring_plan.estimate(problem, (remote,), H200, link)
        bound = max(compute, remote / link.copy_bandwidth)
        assert bound <= seconds < 1.1 * bound, fraction
        assert seconds > 0.995 * before  # a whole product has whole waves of tiles
        before = seconds


def test_the_copy_overhead_is_what_pieces_of_4_mib_cost() -> None:
    overhead = piece_overhead(H200, HOST)
    assert 2.3e-6 < overhead < 2.7e-6
    assert (1 << 20) / (overhead + (1 << 20) / HOST.copy_bandwidth) == pytest.approx(49.2e9, 0.01)
    assert piece_overhead(H200, PEER) == H200.operator_floor


def test_the_ring_is_preferred_where_it_is_clearly_faster() -> None:
    problem = LinearProblem(8192, 28672, 8192, BF16)
    remote = (problem.weight_bytes // 2,)
    seconds = ring_plan.estimate(problem, remote, H200, HOST)
    assert ring_plan.prefers_ring(problem, remote, H200, HOST, 2 * seconds)
    assert not ring_plan.prefers_ring(problem, remote, H200, HOST, 1.01 * seconds)
    assert not ring_plan.prefers_ring(problem, remote, H200, HOST, 0.5 * seconds)


def test_residencies_of_a_cut_row_and_of_whole_rows() -> None:
    problem = LinearProblem(129, 64, 32, BF16)
    assert ring_plan.residencies(problem, (0, 64 * 64, 10 * 64, 10 * 64 + 2)) == (
        Residency(64, 64),
        Residency(0, 0),
        Residency(54, 54),
        Residency(53, 54),
    )


def test_an_estimate_needs_no_piece_bandwidth() -> None:
    problem = LinearProblem(512, 4096, 4096, torch.float16)
    unknown = replace(HOST, piece_copy_bandwidth=0.0)
    assert ring_plan.estimate(problem, (1 << 20,), H200, unknown) > 0
