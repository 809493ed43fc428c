"""The time of an operator: the formula, its slopes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dak_inductor.cost_model import (
    COMPUTE_SHARE,
    HBM_SHARE,
    OpCost,
    both_seconds,
    compute_seconds,
    divided_seconds,
    link_bandwidth,
    local_bandwidth,
    op_cost,
    op_floor,
    op_time,
    peak_flops,
    step_bound,
)
from dak_inductor.errors import PlanError
from dak_inductor.hardware import load
from dak_inductor.hardware_profile import HardwareProfile
from dak_inductor.plan import OpUse

H200 = load("h200")
HOST = H200.link("cpu")
WEIGHT = 117_440_512  # bytes of a 4096 x 14336 bf16 linear

sizes = st.floats(0, 1e11)
shares = st.floats(0, 1)
seconds = st.floats(0, 10)
costs = st.builds(  # link and weight are the same bytes over two bandwidths
    lambda weight, activations, slower, compute: OpCost(
        weight, activations, weight * slower, compute
    ),
    st.just(0.0) | st.floats(1e-9, 10),
    seconds,
    st.floats(0.5, 1000),
    seconds,
)


def linear(rows: int, touched: float = WEIGHT) -> OpUse:
    flops = touched * rows  # two per element of two bytes
    return OpUse("op", "decode", "w", "linear", touched, 0.0, flops, 1.0, m=rows)


def scaled(profile: HardwareProfile, factor: float) -> HardwareProfile:
    return replace(
        profile,
        hbm_bandwidth=profile.hbm_bandwidth * factor,
        matmul_flops={k: v * factor for k, v in profile.matmul_flops.items()},
        operator_floor=profile.operator_floor / factor,
        links={
            k: replace(
                v,
                direct_bandwidth=v.direct_bandwidth * factor,
                copy_bandwidth=v.copy_bandwidth * factor,
            )
            for k, v in profile.links.items()
        },
    )


@given(sizes, sizes, sizes, shares)
def test_op_time_is_the_formula(touched: float, other: float, flops: float, share: float) -> None:
    use = OpUse("op", "g", "w", "linear", touched, other, flops, 1.0)
    expected = max(
        ((1 - share) * touched + other) / (HBM_SHARE * H200.hbm_bandwidth),
        share * touched / HOST.direct_bandwidth,
        flops / (COMPUTE_SHARE * H200.matmul_flops["bfloat16"]),
    )
    time = op_time(use, share, H200, HOST)
    assert time == pytest.approx(expected + op_floor("linear", H200), rel=1e-12)
    assert H200.operator_floor == op_floor("embedding", H200) < op_floor("linear", H200)


@given(costs, shares, shares, shares)
def test_time_is_convex(cost: OpCost, left: float, right: float, weight: float) -> None:
    between = weight * left + (1 - weight) * right
    chord = weight * cost.time(left) + (1 - weight) * cost.time(right)
    assert cost.time(between) <= chord * (1 + 1e-9) + 1e-12


@given(costs, shares)
def test_slopes_rebuild_the_time(cost: OpCost, share: float) -> None:
    slope, kinks = cost.slopes()
    time = cost.time(0.0) + slope * share
    time += sum(jump * (share - kink) for kink, jump in kinks if kink < share)
    assert time == pytest.approx(cost.time(share), rel=1e-7, abs=1e-9)
    assert all(0 < kink < 1 and jump > 0 for kink, jump in kinks)


def test_a_memory_bound_operator_is_fastest_where_link_and_hbm_end_together() -> None:
    balance = HOST.direct_bandwidth / (HOST.direct_bandwidth + local_bandwidth(H200))
    assert 0.010 < balance < 0.012  # 1.1% on an H200 behind PCIe
    use = linear(rows=8)
    best = op_time(use, balance, H200, HOST)
    assert best < op_time(use, 0.0, H200, HOST)
    assert best < op_time(use, balance * 0.9, H200, HOST)
    assert best < op_time(use, balance * 1.1, H200, HOST)


def test_a_compute_bound_operator_is_free_up_to_its_kink() -> None:
    use = linear(rows=16384)
    free = compute_seconds(use, H200) * link_bandwidth(use, HOST) / WEIGHT
    assert 0.5 < free <= 1 or free > 1
    share = min(free, 1.0)
    resident = op_time(use, 0.0, H200, HOST)
    assert op_time(use, share * 0.999, H200, HOST) == pytest.approx(resident)
    slow = linear(rows=1024)
    free = compute_seconds(slow, H200) * link_bandwidth(slow, HOST) / WEIGHT
    assert op_time(slow, free * 2, H200, HOST) > 1.9 * op_time(slow, free, H200, HOST) - 1e-5


@given(st.integers(1, 20000), shares, st.floats(0.1, 10))
def test_k_times_the_bandwidth_takes_a_kth_of_the_time(
    rows: int, share: float, factor: float
) -> None:
    fast = scaled(H200, factor)
    time = op_time(linear(rows), share, fast, fast.link("cpu"))
    assert time * factor == pytest.approx(op_time(linear(rows), share, H200, HOST), rel=1e-9)


def test_peak_rate_of_a_dtype_that_was_not_measured() -> None:
    profile = replace(H200, matmul_flops={"bfloat16": 8e14, "float32": 1e14})
    assert peak_flops(profile, "bfloat16") == 8e14
    assert peak_flops(profile, "float16") == 8e14
    assert peak_flops(profile, "float64") == 1e14


def test_another_strategy_than_direct_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match="staged"):
        op_cost(replace(linear(8), strategy="staged"), H200, HOST)


def test_step_bound_takes_the_slowest_resource() -> None:
    best = max(HOST.direct_bandwidth, HOST.copy_bandwidth)
    assert step_bound(3e9, 4e9, 0.0, H200, HOST) == pytest.approx(4e9 / best)
    assert step_bound(3e9, 4e9, 7.0, H200, HOST) == 7.0
    assert step_bound(48e9, 0.0, 0.0, H200, HOST) == pytest.approx(48e9 / H200.hbm_bandwidth)


def test_products_of_many_tokens_get_their_rows_by_copy_engine() -> None:
    assert HOST.copy_bandwidth > HOST.direct_bandwidth
    assert link_bandwidth(linear(rows=129), HOST) == HOST.copy_bandwidth
    assert link_bandwidth(linear(rows=128), HOST) == HOST.direct_bandwidth
    slow = replace(HOST, copy_bandwidth=HOST.direct_bandwidth / 2)
    assert link_bandwidth(linear(rows=129), slow) == HOST.direct_bandwidth
    assert link_bandwidth(replace(linear(rows=129), kind="attention"), HOST) != HOST.copy_bandwidth


def test_who_reads_both_memories_pays_for_it_once() -> None:
    many, few = linear(rows=4096), linear(rows=8)
    attention = replace(few, kind="attention")
    for use in (many, few, attention):
        assert both_seconds(use, 0.0, H200, HOST) == both_seconds(use, 1.0, H200, HOST) == 0.0
    assert both_seconds(few, 0.1, H200, HOST) == 0.0, "alone_seconds has it"
    assert both_seconds(attention, 0.1, H200, HOST) == 3 * H200.operator_floor
    assert both_seconds(many, 0.1, H200, HOST) == divided_seconds(H200)


@given(st.integers(129, 8192), st.floats(1e-6, 0.999))
def test_a_divided_product_pays_no_more_than_reading_in_place(rows: int, share: float) -> None:
    seconds = both_seconds(linear(rows=rows), share, H200, HOST)
    in_place = share * WEIGHT * -(-rows // 128) / HOST.direct_bandwidth
    assert seconds == pytest.approx(min(divided_seconds(H200), in_place))
