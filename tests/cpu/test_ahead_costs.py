"""What calls become for the planner of copies ahead: rows by tier, seconds, reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from dak_inductor import hardware
from dak_inductor.cost_model import alone_seconds, local_bandwidth, op_floor
from dak_inductor.lowering import host_cost
from dak_inductor.lowering.ahead import step_costs
from dak_inductor.lowering.ahead.sequence import CallSequence, StepCall, call_of
from dak_inductor.lowering.ahead.step_costs import step_ops, tier_of
from dak_inductor.lowering.ahead.step_op import RowSpan, StepOp
from dak_inductor.lowering.linear import ring_plan
from dak_inductor.lowering.linear.trials import Trials
from dak_inductor.lowering.linear.ways import Way

from .ahead_model import BF16, Layer, weight_of

H200 = hardware.load("h200")
HOST = H200.link("cpu")
RING_ALONE = host_cost.RING_SECONDS + host_cost.IN_LINE_SECONDS


def ops_of(*calls):
    found = step_ops(calls, "simulated", None)
    assert found is not None
    return found


def inputs(tokens: int, k: int = 64) -> torch.Tensor:
    return torch.randn(tokens, k, dtype=BF16)


def test_rows_by_tier_with_a_cut_row_and_without() -> None:
    buffer, weight = weight_of(100, 64, 1.0)
    (stored,) = call_of(Layer((weight,)).product(inputs(1))).weights
    for split, start, remote in (
        (0, 0, 0),
        (128 * 8, 8, 8),
        (128 * 19, 16, 19),
        (128 * 19 + 2, 16, 20),
        (128 * 99 + 2, 100, 100),
        (128 * 100, 100, 100),
    ):
        buffer.split = split
        assert stored.span() == RowSpan(100, start, remote, 128), split
    half = call_of(Layer((weight[50:],)).product(inputs(1))).weights[0]
    buffer.split = 128 * 60
    assert half.span() == RowSpan(50, 8, 10, 128)


def test_a_direct_product_of_few_tokens_is_bound_by_its_slowest_resource() -> None:
    n, k = 4096, 1024
    for share, expected in (
        (0.5, n * k / HOST.direct_bandwidth),
        (0.0, 2 * n * k / local_bandwidth(H200)),
    ):
        weight = weight_of(n, k, share)[1]
        (op,) = ops_of(call_of(Layer((weight,)).product(inputs(1, k))))
        seconds = op.direct - op_floor("linear", H200) - alone_seconds(1, share, H200, HOST)
        assert seconds == pytest.approx(expected, rel=1e-3)
        assert op.link == pytest.approx(share * 2 * n * k / HOST.direct_bandwidth, rel=1e-3)
        assert op.remote_bytes == pytest.approx(share * 2 * n * k, abs=2 * k)


def test_many_tokens_cost_what_the_ring_is_estimated_to() -> None:
    weight = weight_of(4096, 1024, 0.5)[1]
    few, many = (ops_of(call_of(Layer((weight,)).product(inputs(m, 1024))))[0] for m in (8, 2048))
    assert many.direct > few.direct and many.row > few.row
    assert many.link < few.link, "copied, not read by kernels"
    assert many.own_ring and not few.own_ring


def test_local_rows_are_copied_too_where_one_product_is_faster_than_two() -> None:
    """What it costs to read and write them must be less than what the second product costs: with a
    bias always so, in proportion, the more tokens there are."""

    def op(rows: int, m: int, *, bias: bool) -> StepOp:
        product = Layer((weight_of(rows, 1024, 0.5)[1],)).product(inputs(m, 1024))
        biases = (torch.zeros(rows, dtype=BF16) if bias else None,)
        return ops_of(call_of(replace(product, biases=biases, key=None)))[0]

    few, many, wide = (op(*asked, bias=True) for asked in ((4096, 64), (4096, 8192), (65536, 256)))
    assert few.weights[0].start == wide.weights[0].start // 16 == 2048 and few.local and wide.local
    (span,) = many.weights
    assert (span.start, span.remote, many.local) == (0, 2048, 0.0)
    assert many.remote_bytes == few.remote_bytes, "the link copies no more"
    nbytes = span.remote * span.row_bytes
    assert many.rest - few.rest >= 2 * nbytes / H200.hbm_bandwidth
    per_row = 2 * 8192 / H200.hbm_bandwidth
    assert many.piece_row > 2 * per_row, "a bias is written and read again"
    assert op(4096, 8192, bias=False).piece_row == 0.0


def test_the_host_takes_as_long_for_any_number_of_tokens_but_for_a_ring_of_its_own() -> None:
    weight = weight_of(4096, 1024, 0.5)[1]
    few, more, ring = (
        ops_of(call_of(Layer((weight,)).product(inputs(m, 1024))))[0] for m in (1, 128, 2048)
    )
    assert few.host == more.host == host_cost.KERNEL_SECONDS
    assert ring.host == RING_ALONE
    (stock,) = ops_of(call_of(Layer((weight,)).product(inputs(1, 1024).float())))
    assert stock.host == host_cost.STOCK_SECONDS


def test_reasons_of_what_cannot_be_staged() -> None:
    weight = weight_of(96, 64, 0.5)[1]
    flat = Layer((weight,))
    call = call_of(flat.product(inputs(2)))
    assert call.refusal == "" and tier_of([call]) == "simulated"
    (elsewhere,) = step_ops([call], "cpu", None) or ()
    assert "simulated" in elsewhere.refusal and not elsewhere.weights
    wide = Layer((weight_of(96, 128, 0.5)[1][:, :64],))
    assert "gaps" in call_of(wide.product(inputs(2))).refusal
    single = call_of(flat.product(inputs(2).float()))
    assert "bfloat16" in single.refusal and single.facts is None
    (op,) = ops_of(single)
    assert op.direct == 0 and op.refusal == single.refusal
    buffers = flat.product(inputs(2)).buffers
    assert "writes" in call_of(flat.product(inputs(2)), [b for b in buffers if b]).refusal


def test_calls_are_the_same_only_with_equal_weights_tokens_and_epilogue() -> None:
    first, second = (weight_of(96, 64, 0.5)[1] for _ in range(2))
    key = Layer((first,)).product(inputs(2)).key
    assert key == Layer((first,)).product(inputs(2)).key
    for other in (
        Layer((second,)).product(inputs(2)),
        Layer((first,)).product(inputs(3)),
        Layer((first,), "silu").product(inputs(2)),
        Layer((first,), residual=True).product(inputs(2)),
        Layer((first[:48],)).product(inputs(2)),
        Layer((first, second)).product(inputs(2)),
        Layer((first,)).product(inputs(2).float()),
        replace(Layer((first,)).product(inputs(2)), biases=(torch.zeros(96),), key=None),
    ):
        assert other.key != key


def test_a_sequence_keeps_no_weight_alive() -> None:
    pair = weight_of(96, 64, 0.5)
    sequence = CallSequence((call_of(Layer((pair[1],)).product(inputs(2))),))
    assert sequence.splits() == ((pair[0].split,),)
    del pair
    assert sequence.splits() is None
    assert step_ops(sequence.calls, "simulated", None) is None


WAYS = (Way("direct", 30e-6), Way("ring", 50e-6), Way("stock"))


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Trials:
    """Of this test alone, with three ways for each product of many tokens."""
    made = Trials(capturing=lambda _: False)
    made.switch(True)
    monkeypatch.setattr(step_costs, "TRIALS", made)
    monkeypatch.setattr(step_costs, "_has_ways", lambda _: True)
    monkeypatch.setattr(step_costs, "ways_of", lambda *_: WAYS)
    return made


@pytest.fixture
def prefill() -> Iterator[Callable[..., StepCall]]:
    """Makes a call of so many tokens."""
    alive = []

    def call(m: int = 256, share: float = 0.1) -> StepCall:
        alive.append(weight_of(1024, 512, share))
        return call_of(Layer((alive[-1][1],)).product(inputs(m, 512)))

    yield call
    alive.clear()


def ring_alone(call: StepCall) -> float:
    assert call.facts is not None
    return ring_plan.estimate(call.facts.problem, call.facts.remote_bytes, H200, HOST)


@pytest.mark.parametrize(
    ("seconds", "times"),
    [
        ((40e-6, 80e-6, 60e-6), 40 / 83),
        ((90e-6, 80e-6, 60e-6), 63 / 83),
        ((90e-6, 80e-6, 85e-6), 1.0),
    ],
    ids=["direct", "stock", "ring"],
)
def test_many_tokens_cost_the_rings_estimate_as_often_as_the_trial_took_its_time(
    trials: Trials, prefill: Callable[..., StepCall], seconds: tuple[float, ...], times: float
) -> None:
    call = prefill()
    assert call.facts is not None
    (before,) = ops_of(call)
    assert before.direct == 30e-6, "the estimates' choice"
    trials.choose(call.facts, WAYS, lambda: seconds)
    (op,) = ops_of(call)
    assert op.direct == pytest.approx(times * ring_alone(call)), "not what was known before it"
    assert (op.local, op.row, op.part) == (before.local, before.row, before.part)
    trials.switch(False)
    assert ops_of(call)[0] == before


def test_a_split_of_another_kind_has_estimates_alone(
    trials: Trials, prefill: Callable[..., StepCall]
) -> None:
    call, other = prefill(), prefill(share=0.5)
    assert call.facts is not None
    trials.choose(call.facts, WAYS, lambda: (90e-6, 80e-6, 60e-6))
    assert ops_of(other)[0].direct == 30e-6


def test_the_way_that_spares_the_host_is_priced_by_the_same_trial(
    trials: Trials, prefill: Callable[..., StepCall]
) -> None:
    call = prefill()
    assert call.facts is not None
    trials.choose(call.facts, WAYS, lambda: (130e-6, 80e-6, 110e-6))
    (op,), (spared,) = ops_of(call), step_ops([call], "simulated", None, spared=True) or ()
    assert op.direct == pytest.approx(ring_alone(call)) and op.host == RING_ALONE
    assert spared.direct == pytest.approx(113 / 83 * ring_alone(call))
    assert spared.host == host_cost.STOCK_SECONDS


def test_trials_change_nothing_of_few_tokens(
    trials: Trials, prefill: Callable[..., StepCall]
) -> None:
    """So placements are compared by one measure, tried or not."""
    call = prefill(m=8)
    assert call.facts is not None
    before = ops_of(call)
    trials.choose(call.facts, WAYS, lambda: (90e-6, 80e-6, 60e-6))
    assert ops_of(call) == before
