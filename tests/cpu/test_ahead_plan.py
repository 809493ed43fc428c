"""Copies ahead as data: what is staged, where it goes in the ring, and what it is said to take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dak_inductor import hardware
from dak_inductor.copy_ring import LEAST_RING_BYTES, RING_BYTES
from dak_inductor.cost_model import HBM_SHARE, local_bandwidth, op_floor
from dak_inductor.lowering.ahead import plan_choice, staged_plans
from dak_inductor.lowering.ahead.ring_places import ALIGNMENT, places, side_by_side
from dak_inductor.lowering.ahead.step_costs import link_rates
from dak_inductor.lowering.ahead.step_op import RowSpan, StepOp
from dak_inductor.lowering.ahead.step_plan import StepPlan, StepPlans
from dak_inductor.lowering.ahead.timeline import LOCAL
from dak_inductor.lowering.host_cost import (
    COPY_SECONDS,
    IN_LINE_SECONDS,
    KERNEL_SECONDS,
    PART_SECONDS,
    RING_SECONDS,
    STAGED_SECONDS,
)

H200 = hardware.load("h200")
HOST = H200.link("cpu")
RATES = link_rates(H200, HOST)
MIB = 1 << 20
RING_ALONE = RING_SECONDS + IN_LINE_SECONDS


def choose(*args, **options) -> StepPlan:
    """The plan for CUDA graphs, where only the GPU takes time."""
    return plan_choice.choose(*args, **options).captured


def op_of(
    rows: int, row_bytes: int, remote_share: float, *, gated: bool = False, launch: bool = False
) -> StepOp:
    """A product of one token; the split cuts a row. launch: the kernel takes it."""
    cut = round(rows * (1 - remote_share))
    start = cut // 8 * 8 if cut < rows else rows
    span = RowSpan(rows, start, min(cut + 1, rows) if cut < rows else rows, row_bytes)
    spans = (span, span) if gated else (span,)
    nbytes = sum(each.rows * each.row_bytes for each in spans)
    remote = sum(each.remote_bytes for each in spans)
    link = remote / HOST.direct_bandwidth
    local = (nbytes - remote) / H200.hbm_bandwidth
    return StepOp(
        max(local, link) + 2e-6, link, spans, local, 4e-6, row_bytes / 4e12, 2e-6,
        nbytes / H200.hbm_bandwidth + 2e-6 if launch else 0.0,
        host=KERNEL_SECONDS,
    )  # fmt: skip


@st.composite
def steps(draw: st.DrawFn) -> list[StepOp]:
    kinds = [
        op_of(
            draw(st.integers(1, 6000)),
            draw(st.sampled_from([16, 1024, 8192, 28672])),
            draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0])),
            gated=draw(st.booleans()),
            launch=draw(st.booleans()),
        )
        for _ in range(draw(st.integers(1, 4)))
    ]
    kinds.append(StepOp(3e-6, 1e-6, refusal="of another kind"))
    return draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=25))


def check(ops: Sequence[StepOp], plan: StepPlan, room: int) -> None:
    """What must hold of every plan."""
    assert plan.ring_bytes <= room and bool(plan.ring_bytes) == bool(plan.parts)
    covered: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for part in plan.parts:
        assert part.start <= part.remote <= part.stop and part.start < part.stop
        assert part.start % 8 == 0
        covered.setdefault((part.op, part.weight), []).append((part.start, part.stop))
    for number, (op, step) in enumerate(zip(ops, plan.ops, strict=True)):
        assert step.reason
        if step.strategy == "direct":
            assert step.order == () and not any(part.op == number for part in plan.parts)
            continue
        mine = [position for position, part in enumerate(plan.parts) if part.op == number]
        assert [position for position in step.order if position != LOCAL] == mine
        if step.launched:
            assert op.launch and step.order == tuple(mine)
            assert all(plan.at[part].after < mine[0] for part in mine), "it waits for itself"
            places = {(part.op, part.weight) for part in plan.parts if part.op == number}
            assert len(places) == len(mine), "rows of a weight lie in two places"
        else:
            assert step.order.count(LOCAL) == any(span.start for span in op.weights)
        copied = 0
        for weight, span in enumerate(op.weights):
            found = covered.get((number, weight), [])
            ends = [span.start, *(stop for _, stop in found)]
            assert [start for start, _ in found] == ends[:-1] and ends[-1] == span.rows
        for position in mine:
            part = plan.parts[position]
            copied += part.copied
            span = op.weights[part.weight]
            assert part.remote == min(max(span.remote, part.start), part.stop)
        assert copied == op.remote_bytes, "a remote byte is copied twice, or never"
    read_order = [number for step in plan.ops for number in step.order if number != LOCAL]
    assert read_order == list(range(len(plan.parts)))
    for number, place in enumerate(plan.at):
        assert place.offset % ALIGNMENT == 0 and place.offset + place.size <= plan.ring_bytes
        assert place.size == plan.parts[number].size and place.after < number
        for earlier in range(place.after + 1, number):
            other = plan.at[earlier]
            assert (
                place.offset + place.size <= other.offset
                or other.offset + other.size <= place.offset
            ), "a part that may not be read yet is overwritten"
    both = list(zip(ops, plan.ops, strict=True))
    staged = [op for op, step in both if step.strategy == "staged"]
    direct = [op for op, step in both if step.strategy == "direct"]
    link = sum(op.remote_bytes / RATES.copy for op in staged) + sum(op.link for op in direct)
    work = sum(op.launch if step.launched else op.local for op, step in both if step.order)
    work += sum(op.direct for op in direct)
    assert plan.seconds >= max(link, work) * (1 - 1e-9), "faster than the bound"


def host_seconds(ops: Sequence[StepOp], plan: StepPlan) -> float:
    """Of the products as planned, one after the other."""
    seconds = 0.0
    for number, (op, step) in enumerate(zip(ops, plan.ops, strict=True)):
        parts = sum(part.op == number for part in plan.parts)
        if step.launched:
            seconds += op.host + parts * COPY_SECONDS
        elif parts:
            seconds += STAGED_SECONDS + (parts - 1) * PART_SECONDS
        else:
            seconds += op.host
    return seconds


@settings(deadline=None, max_examples=80)
@given(steps(), st.sampled_from([4, 5, 16, 64]), st.sampled_from(["auto", "staged"]))
def test_every_plan_holds(ops: list[StepOp], room: int, strategy: str) -> None:
    plans = plan_choice.choose(ops, RATES, strategy=strategy, room=room * MIB)  # type: ignore[arg-type]
    for plan in (plans.captured, plans.eager):
        check(ops, plan, room * MIB)
        if strategy == "auto":
            assert plan.seconds <= plan.direct_seconds
        else:
            able = sum(op.remote_bytes > 0 for op in ops)
            assert plan.staged == able
    assert plans.captured.host_seconds == 0 and not plans.captured.waits_for_host
    assert plans.eager.host_seconds == pytest.approx(host_seconds(ops, plans.eager))
    assert plans.eager.seconds >= max(plans.captured.seconds, plans.eager.host_seconds)
    assert plans.of(captured=True) is plans.captured and plans.of(captured=False) is plans.eager


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.lists(st.integers(1, 5000), max_size=2), min_size=1, max_size=40),
    st.integers(0, 10000),
)
def test_a_place_waits_for_all_that_lay_there(groups: list[list[int]], more: int) -> None:
    ring = max(map(side_by_side, groups)) + more
    found = places(groups, ring)
    assert [place.size for place in found] == [size for group in groups for size in group]
    first: list[int] = []  # of each part's group
    for group in groups:
        first += [len(first)] * len(group)
    for number, place in enumerate(found):
        assert place.after < first[number], "parts that are read at once wait for each other"
        overlapped = [
            earlier
            for earlier, other in enumerate(found[:number])
            if other.offset < place.offset + place.size and place.offset < other.offset + other.size
        ]
        assert place.offset + place.size <= ring
        assert place.after >= max(overlapped, default=-1)


def llama(remote: float, layers: int = 8) -> list[StepOp]:
    """Decode of Llama-3-8B: qkv, o, gate and up, down."""
    layer = [
        op_of(6144, 8192, remote),
        op_of(4096, 8192, remote),
        op_of(14336, 8192, remote, gated=True),
        op_of(4096, 28672, remote),
    ]
    return layer * layers


def test_auto_stages_where_most_of_the_time_is_the_links() -> None:
    for share in (0.1, 0.3, 1.0):
        plan = choose(llama(share), RATES, strategy="auto", room=256 * MIB)
        assert plan.staged == 32
        assert 0.92 < plan.seconds / plan.direct_seconds < 0.965


def test_none_with_a_ring_of_its_own_is_left_out_beside_copies_ahead() -> None:
    """Its copies would wait for all that were queued ahead."""
    few = op_of(4096, 1024, 0.01)
    ops = [op_of(28672, 8192, 0.5), few, op_of(28672, 8192, 0.5)] * 8
    alone = choose(ops, RATES, strategy="auto", room=256 * MIB)
    assert alone.staged == 16, "a product that reads the link itself"
    rings = [replace(op, own_ring=True) if op == few else op for op in ops]
    assert choose(rings, RATES, strategy="auto", room=256 * MIB).staged == 24


def test_a_weight_that_is_not_multiplied_whole_costs_more() -> None:
    op = replace(op_of(2048, 8192, 1.0), piece_row=1e-6)
    plain = replace(op, piece_row=0.0)
    (whole,) = {
        choose([each], RATES, strategy="staged", room=64 * MIB).work for each in (op, plain)
    }
    in_parts = [
        choose([each], RATES, strategy="staged", room=12 * MIB).work for each in (op, plain)
    ]
    assert in_parts[0] - in_parts[1] == pytest.approx(2048e-6, rel=0.02) and whole < in_parts[1]


def plans_of(ops: Sequence[StepOp]) -> StepPlans:
    return plan_choice.choose(ops, RATES, strategy="auto", room=256 * MIB)


def test_outside_of_cuda_graphs_the_host_decides_where_it_takes_longer() -> None:
    """8 layers at 2%: the GPU gains 0.1 ms of 1.4 by copies that take the host 2.9 and more."""
    ops = llama(0.02)
    plans = plans_of(ops)
    assert plans.captured.staged == 16 and plans.captured.seconds < 1.4e-3
    eager = plans.eager
    assert eager.staged == 0 and not eager.waits_for_host
    assert eager.seconds == eager.direct_seconds == plans.captured.direct_seconds
    assert eager.host_seconds == pytest.approx(32 * KERNEL_SECONDS)
    assert f"ms of the host, direct {eager.seconds * 1e3:.3f} ms" in eager.ops[0].reason
    asked = plan_choice.choose(ops, RATES, strategy="staged", room=256 * MIB).eager
    assert asked.staged == 32 and asked.seconds == pytest.approx(
        32 * STAGED_SECONDS + 8 * PART_SECONDS
    ), "gate and up are two parts"


def test_where_the_host_decides_products_take_the_ways_that_spare_it() -> None:
    """And where the GPU does those that it takes least for, though the host takes longer."""
    for seconds, spares in ((24e-6, True), (300e-6, False)):
        ring = [StepOp(seconds, seconds / 2, host=RING_ALONE)] * 24
        kernel = [StepOp(1.1 * seconds, seconds / 2, host=KERNEL_SECONDS)] * 24
        plans = plan_choice.choose(ring, RATES, strategy="auto", room=64 * MIB, spared=kernel)
        assert plans.eager.spares_host is spares and not plans.captured.spares_host
        assert plans.captured.seconds == pytest.approx(24 * seconds)
        expected = 24 * (KERNEL_SECONDS if spares else seconds)
        assert plans.eager.seconds == pytest.approx(expected)
    slower = [replace(op, direct=10 * RING_ALONE) for op in kernel]
    plans = plan_choice.choose(
        [replace(op, direct=30e-6) for op in ring], RATES, strategy="auto", room=64 * MIB,
        spared=slower,
    )  # fmt: skip
    assert plans.eager.waits_for_host and not plans.eager.spares_host


def test_long_products_are_staged_outside_of_cuda_graphs_too() -> None:
    """Decode with most remote; and prefill, whose host time is that of few tokens."""
    few = llama(0.02)
    prefill = [replace(op, direct=op.direct + 1e-3, local=op.local + 9e-4) for op in few]
    for ops in (llama(1.0), prefill):
        captured, eager = plans_of(ops).captured, plans_of(ops).eager
        assert eager.ops == captured.ops and eager.staged == 32
        assert eager.seconds == captured.seconds and not eager.waits_for_host
        assert 0 < eager.host_seconds < eager.seconds


def test_auto_stays_direct_at_the_balance_and_with_nothing_remote() -> None:
    for share in (0.0, 0.005, 0.011):
        plan = choose(llama(share), RATES, strategy="auto", room=256 * MIB)
        assert plan.staged == 0 and plan.seconds == plan.direct_seconds
        assert all(op.reason for op in plan.ops)


def test_auto_evens_out_products_of_which_some_are_all_remote() -> None:
    """Direct, the link idles while local weights are read; ahead, it never does."""
    mixed = [op_of(14336, 8192, 0.0), op_of(4096, 8192, 0.03)] * 20
    plan = choose(mixed, RATES, strategy="auto", room=64 * MIB)
    assert plan.staged and plan.seconds < 0.9 * plan.direct_seconds
    assert {op.strategy for op in plan.ops} == {"direct", "staged"}


def test_a_ring_that_weights_pay_for_must_save_more_than_it_costs() -> None:
    few = llama(0.1, layers=2)
    assert choose(few, RATES, strategy="auto", room=64 * MIB).staged
    assert not choose(few, RATES, strategy="auto", room=64 * MIB, charged=True).staged
    many = llama(0.1, layers=32)
    assert choose(many, RATES, strategy="auto", room=64 * MIB, charged=True).staged


def test_a_product_is_one_launch_where_two_of_its_kind_fit_the_ring() -> None:
    few = [op_of(4096, 8192, 0.1, launch=True), op_of(14336, 8192, 0.05, gated=True, launch=True)]
    plan = choose(few * 8, RATES, strategy="staged", room=64 * MIB)
    assert all(op.launched for op in plan.ops[:-1]) and len(plan.parts) == 24
    assert not plan.ops[-1].launched, "it could not begin before the last copy has arrived"
    in_parts = choose(
        [replace(op, launch=0.0) for op in few] * 8, RATES, strategy="staged", room=64 * MIB
    )
    assert plan.seconds <= in_parts.seconds
    large = [op_of(4096, 8192, 0.6, launch=True)] * 8  # 20 MiB each
    for room in (32, 64):
        plan = choose(large, RATES, strategy="staged", room=room * MIB)
        assert all(op.launched for op in plan.ops) is (room == 64)


def test_the_ring_is_the_smallest_that_is_as_fast() -> None:
    """Where the link has time to wait it holds one product, though two would fit, and one third of
    what is remote."""
    plain = [op_of(14336, 8192, 0.0)] * 6
    few = choose(
        [*plain, op_of(4096, 14336, 0.075, launch=True)] * 3, RATES, strategy="auto", room=64 * MIB
    )
    assert few.staged == 3 and few.ring_bytes == few.parts[0].size
    deep = choose(llama(1.0), RATES, strategy="auto", room=64 * MIB)
    assert deep.ring_bytes == 64 * MIB, "larger parts, fewer gaps between copies"
    half = choose(llama(1.0), RATES, strategy="auto", room=32 * MIB)
    assert deep.seconds < half.seconds


def test_a_ring_that_is_paid_for_holds_two_of_the_largest_launches() -> None:
    op = op_of(4096, 28672, 0.05, launch=True)
    plain = [op_of(14336, 8192, 0.0)] * 4
    plan = choose([*plain, op] * 32, RATES, strategy="auto", room=64 * MIB, charged=True)
    assert plan.staged == 32 and all(step.launched for step in plan.ops if step.order)
    assert plan.ring_bytes == 2 * side_by_side([plan.parts[0].size])


def served(rows: int, columns: int, remote_rows: int = 0) -> StepOp:
    """A product of one token with the costs that `step_costs` gives it on the H200."""
    seconds = rows * columns * 2 / local_bandwidth(H200)
    floor, count = op_floor("linear", H200), H200.operator_floor
    local = rows - remote_rows
    link = remote_rows * columns * 2 / HOST.direct_bandwidth
    return StepOp(
        max(link, seconds * local / rows) + floor + (2.5 * count if remote_rows else 0.0),
        link,
        (RowSpan(rows, local, local, columns * 2),),
        seconds * local / rows + floor,
        floor,
        columns * 2 / local_bandwidth(H200),
        count,
        seconds + floor,
    )


def test_what_the_link_hides_in_the_prediction_still_counts() -> None:
    """Llama-3-8B, 2% remote: parts begin before all rows are there, which saves 0.5% of a step of
    nothing but products, and do 8% more."""
    layer = [served(rows, 4096) for rows in (4096, 1024, 1024, 4096, 28672)]
    ops = [op for rows in (*[320] * 7, 194) for op in (*layer, served(4096, 14336, rows))]
    found = staged_plans.staged_plans(ops, RATES, "staged", 64 * MIB, lambda plan: plan.seconds)
    fastest = min(found, key=lambda plan: plan.seconds)
    chosen = choose(ops, RATES, strategy="staged", room=64 * MIB)
    assert all(step.launched for step in chosen.ops if step.order)
    assert chosen.ring_bytes == 2 * chosen.parts[0].size
    assert fastest.seconds < chosen.seconds < 1.01 * fastest.seconds
    assert chosen.work < 0.95 * fastest.work


def test_copies_that_come_while_other_work_runs_are_not_waited_for() -> None:
    """With nothing between the products the last is in parts, so that only a part of it is behind
    the last copy. With more than its copies take in all it is one launch."""
    product = op_of(4096, 28672, 0.2, launch=True)
    local = op_of(14336, 8192, 0.0)
    ops = [local, product] * 4
    bound = choose(ops, RATES, strategy="auto", room=RING_BYTES)
    assert bound.ops[-1].strategy == "staged" and not bound.ops[-1].launched
    work = 1.5 * product.remote_bytes / RATES.copy
    hidden = choose(
        [replace(op, before=work) for op in ops], RATES, strategy="auto", room=RING_BYTES
    )
    assert hidden.staged == bound.staged and hidden.ops[-1].launched
    assert hidden.work > bound.work + 7 * work
    assert hidden.seconds < sum(work + op.launch + op.direct * (not op.launch) for op in ops) * 1.1
    bare = plan_choice.choose(
        [replace(op, before=work) for op in ops], RATES, strategy="auto", room=RING_BYTES
    ).eager
    assert replace(bare, host_seconds=0.0, direct_seconds=0.0) == replace(
        plan_choice.choose(ops, RATES, strategy="auto", room=RING_BYTES).eager,
        host_seconds=0.0, direct_seconds=0.0,
    )  # fmt: skip


def test_without_room_or_when_asked_for_all_is_direct() -> None:
    ops = llama(0.5)
    small = choose(ops, RATES, strategy="staged", room=LEAST_RING_BYTES - 1)
    assert not small.staged and "room" in small.ops[0].reason
    assert not choose(ops, RATES, strategy="direct", room=64 * MIB).staged


def test_rows_that_fit_no_ring_stay_direct() -> None:
    wide = op_of(64, 8 * MIB, 0.5)
    plan = choose([wide, op_of(4096, 8192, 0.5)], RATES, strategy="staged", room=16 * MIB)
    assert [op.strategy for op in plan.ops] == ["direct", "staged"]


def test_refusals_keep_their_reason() -> None:
    ops = [*llama(0.5), StepOp(1e-3, 0.0, refusal="stored otherwise")]
    plan = choose(ops, RATES, strategy="staged", room=64 * MIB)
    assert plan.ops[-1].reason == "stored otherwise"


def test_the_ring_is_no_larger_than_its_parts() -> None:
    plan = choose([op_of(4096, 8192, 0.1)], RATES, strategy="staged", room=64 * MIB)
    assert plan.ring_bytes < 5 * MIB and len(plan.parts) == 1
    assert choose(llama(1.0), RATES, strategy="staged", room=1 << 40).ring_bytes <= (RING_BYTES)


def test_copies_slow_down_what_reads_hbm_as_the_profile_says() -> None:
    """They slow down what would read more than copies leave."""
    assert RATES.slowdown == 1
    half = replace(HOST, copy_interference=0.5 * H200.hbm_bandwidth / HOST.copy_bandwidth)
    assert link_rates(H200, half).slowdown == pytest.approx(2 * HBM_SHARE)
    assert link_rates(H200, replace(HOST, copy_interference=0.0)).slowdown == 1


def test_a_step_is_planned_in_milliseconds() -> None:
    ops = llama(0.1, layers=75)
    seconds = []
    for _ in range(5):
        begun = time.process_time()
        choose(ops, RATES, strategy="auto", room=64 * MIB)
        seconds.append(time.process_time() - begun)
    assert min(seconds) < 0.05  # 10 ms alone
    print(f"{min(seconds) * 1e3:.2f} ms for {len(ops)} products")
