"""Calls of products: served by the way that won, alike without asking again, counted once."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.simulated import SimulatedTier
from dak_inductor.lowering import counters, device_counters, ops, ops_linear
from dak_inductor.lowering.linear import (
    dispatch,
    open_step,
    product,
    routes,
    stock,
    stopwatch,
    trials,
)
from dak_inductor.lowering.linear.operands import Operands
from dak_inductor.lowering.linear.trials import Trials
from dak_inductor.lowering.marks import MARKS

BF16 = torch.bfloat16


def test_counters_are_as_before_and_other_words_as_they_became(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = torch.arange(10, 18)
    overload = SimpleNamespace(default=lambda _: record)
    monkeypatch.setattr(torch.ops.dak, "residency", overload)
    with device_counters.kept([record, record]):
        record += 100
    assert record.tolist() == [110, 11, 12, 13, 14, 115, 116, 117]
    with pytest.raises(ValueError), device_counters.kept([record]):
        record[1:5] = 7
        raise ValueError
    assert record.tolist() == [110, 11, 12, 13, 14, 115, 116, 117]


@pytest.fixture
def tried(h200: None, monkeypatch: pytest.MonkeyPatch):
    """Calls on CPU tensors that dispatch takes for a GPU's; `times` says what is measured."""
    ran: list[str] = []
    times: dict[str, float] = {}
    chooser = Trials(capturing=lambda _: False)
    chooser.switch(True)

    between: list[bool] = []

    def seconds_of(runs: Sequence, device: torch.device, *, in_graph: bool) -> list[float]:
        between.append(in_graph)
        before = len(ran)
        for run in runs:
            run()
        return [times[name] for name in ran[before:]]

    def direct(self, problem, launch) -> torch.Tensor:
        assert launch is prepared
        ran.append("direct")
        return F.linear(self.x, self.weights[0]) + 1

    def at_once(x: torch.Tensor) -> torch.Tensor:
        ran.append("direct")
        return F.linear(x, weight) + 1

    def staged(self) -> torch.Tensor:
        ran.append("ring")
        return F.linear(self.x, self.weights[0]) + 2

    def again_staged(*_, **__):
        return lambda call: (ran.append("ring"), F.linear(call.x, call.weights[0]) + 2)[1]

    def again_stock(weights: tuple[torch.Tensor, ...], layout: str):
        calls = stock.StockProduct(weights, layout)
        return lambda call: (ran.append("stock"), calls(call))[1]

    count = ops_linear.reads.count_dense

    def counted(*arguments) -> None:
        ran.append("stock")
        count(*arguments)

    monkeypatch.setattr(ops_linear.reads, "count_dense", counted)
    monkeypatch.setattr(dispatch, "kernel_refusal", lambda _: None)
    monkeypatch.setattr(dispatch, "TRIALS", chooser)
    monkeypatch.setattr(trials, "SURE", 0.0)  # of so small a weight the ring's estimate is far
    monkeypatch.setattr(stopwatch, "seconds_of", seconds_of)
    monkeypatch.setattr(product.Product, "direct", direct)
    prepared = SimpleNamespace(
        holds=True, takes=lambda x, _: x.is_contiguous(), run=lambda x, *_: at_once(x)
    )
    monkeypatch.setattr(product.Product, "launch", lambda *_: prepared)
    monkeypatch.setattr(product.Product, "staged", staged)
    monkeypatch.setattr(routes, "PreparedRing", again_staged)
    monkeypatch.setattr(routes, "StockProduct", again_stock)
    buffer = SimulatedTier().allocate(512 * 512 * 2, split=512 * 512)
    buffer.tier = "cpu"
    weight = buffer.tensor(BF16, (512, 512)).copy_(torch.randn(512, 512))
    operator = next(each for each in ops.OPERATORS if each.name == "linear")
    run = ops._on_device(operator, operator.stock)
    counters.reset()
    yield SimpleNamespace(
        ran=ran, times=times, weight=weight, run=run, buffer=buffer, chooser=chooser,
        prepared=prepared, between=between,
    )  # fmt: skip
    counters.reset()


@pytest.mark.parametrize("winner", ["direct", "ring", "stock"])
def test_a_call_is_served_by_the_winner(tried: SimpleNamespace, winner: str) -> None:
    tried.times.update({name: 1.0 if name == winner else 2.0 for name in ("direct", "ring")})
    tried.times["stock"] = 1.0 if winner == "stock" else 2.0
    x = torch.randn(200, 512, dtype=BF16)
    result = tried.run(x, tried.weight, None)
    assert sorted(tried.ran[:3]) == ["direct", "ring", "stock"], "each in the trial"
    assert tried.ran[3:] == [winner], "and the call itself"
    expected = F.linear(x, tried.weight) + {"direct": 1, "ring": 2, "stock": 0}[winner]
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    tried.run(x, tried.weight, None)
    assert tried.ran[4:] == [winner]
    call = product.Product(x, (tried.weight,), (tried.buffer,), (None,), None, "none", "out_in")
    assert dispatch.way_of(call) == winner


def test_more_tokens_than_the_kernel_takes_go_through_the_ring_without_asking_again(
    tried: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "MAXIMUM_TOKENS", 100)
    asked: list[str | None] = []
    refusal = product.Product.ring_refusal
    monkeypatch.setattr(
        product.Product, "ring_refusal", lambda call: asked.append(refusal(call)) or asked[-1]
    )
    x = torch.randn(200, 512, dtype=BF16)
    for _ in range(3):
        tried.run(x, tried.weight, None)
    assert tried.ran == ["ring"] * 3 and asked == [None]
    tried.buffer.split = tried.buffer.nbytes
    for _ in range(2):
        result = tried.run(x, tried.weight, None)
        torch.testing.assert_close(result, F.linear(x, tried.weight), rtol=0, atol=0)
    assert tried.ran[3:] == ["stock"] * 2 and asked == [None] * 2, "nothing is remote"


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("activation", ["none", "silu", "gelu", "gelu_tanh"])
def test_a_stock_product_is_what_the_stock_composition_is(
    tried: SimpleNamespace, activation: str, layout: str
) -> None:
    """Bit for bit, what follows it included; and it counts a call of each weight."""
    counters.reset()
    x, bias = torch.randn(2, 3, 512, dtype=BF16), torch.randn(512, dtype=BF16)
    residual = torch.randn(2, 3, 512, dtype=BF16)
    calls = stock.StockProduct((tried.weight,), layout)
    result = calls(Operands(x, (tried.weight,), (bias,), residual, activation, layout))
    asked = (x, tried.weight, bias, residual, activation, layout)
    torch.testing.assert_close(result, ops_linear._linear_epilogue(*asked), rtol=0, atol=0)
    assert counters.total() == tried.buffer.bytes_by_tier()
    gated = stock.StockProduct((tried.weight, tried.weight[:]), layout)
    weights = (tried.weight, tried.weight)
    result = gated(Operands(x, weights, (bias, None), None, activation, layout))
    expected = ops_linear._gated_linear(
        x, tried.weight, tried.weight, bias, None, activation, layout
    )
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_a_captured_call_has_a_ring_of_its_own(
    tried: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "MAXIMUM_TOKENS", 100)
    long_way: list[str] = []
    monkeypatch.setattr(dispatch, "_by", lambda way, *_: long_way.append(way) or torch.zeros(1))
    x = torch.randn(200, 512, dtype=BF16)
    tried.run(x, tried.weight, None)
    tried.run(x, tried.weight, None)
    assert long_way == ["ring"] and tried.ran == ["ring"]
    monkeypatch.setattr(dispatch, "current_capture", lambda _: 1)
    tried.run(x, tried.weight, None)
    assert long_way == ["ring"] * 2 and tried.ran == ["ring"]


def test_where_nothing_is_remote_a_ring_that_won_is_the_stock_operator(
    tried: SimpleNamespace,
) -> None:
    tried.times.update(direct=2.0, ring=1.0)
    tried.buffer.split = tried.buffer.nbytes
    x = torch.randn(200, 512, dtype=BF16)
    for _ in range(2):
        tried.run(x, tried.weight, None)
    assert sorted(tried.ran[:2]) == ["direct", "ring"] and tried.ran[2:] == ["stock"] * 2
    call = product.Product(x, (tried.weight,), (tried.buffer,), (None,), None, "none", "out_in")
    assert dispatch.way_of(call) == "stock"


def test_a_call_spares_the_host_where_the_steps_plan_says_so_but_in_no_capture(
    tried: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried.times.update(direct=60e-6, ring=20e-6, stock=70e-6)
    x = torch.randn(200, 512, dtype=BF16)
    for _ in range(2):
        tried.run(x, tried.weight, None)
    assert tried.ran[3:] == ["ring"] * 2
    assert not open_step.spare_host(True)
    try:
        for _ in range(2):
            tried.run(x, tried.weight, None)
        monkeypatch.setattr(dispatch, "current_capture", lambda _: 1)
        tried.run(x, tried.weight, None)
    finally:
        assert open_step.spare_host(False)
    assert tried.ran[5:] == ["direct"] * 2 + ["ring"]


def test_a_decode_call_of_a_graph_is_tried_between_other_kernels_and_on_its_own(
    tried: SimpleNamespace,
) -> None:
    tried.times.update(direct=9e-6, ring=9e-6, stock=7e-6)
    one, few, many = (torch.randn(tokens, 512, dtype=BF16) for tokens in (1, 16, 200))
    tried.run(few, tried.weight, None)
    assert tried.ran[-1] == "direct", "among its like it starts early"
    assert not open_step.enter_graph(True)
    try:
        tried.run(few.clone(), tried.weight, None)
        assert tried.ran[-1] == "stock"
        tried.run(one, tried.weight, None)
        tried.run(many, tried.weight, None)
    finally:
        assert open_step.enter_graph(False)
    for x in (one, many):
        tried.run(x, tried.weight, None)
    assert tried.between == [False, True, True, False, False], "of many tokens once for both"


def test_without_a_stock_operator_it_is_not_tried(tried: SimpleNamespace) -> None:
    tried.times.update(direct=2.0, ring=1.0)
    options = {"biases": (None,), "residual": None, "activation": "none", "layout": "out_in"}
    x = torch.randn(200, 512, dtype=BF16)
    assert dispatch.run(x, (tried.weight,), **options) is not None
    assert sorted(tried.ran[:2]) == ["direct", "ring"] and tried.ran[2:] == ["ring"]
    del tried.ran[:]
    assert dispatch.run(x[:1], (tried.weight,), **options) is not None
    assert tried.ran == ["direct"]


def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one at each call that is looked at in whole."""
    looked: list[str] = []
    monkeypatch.setattr(dispatch, "kernel_refusal", lambda _: looked.append(""))
    return looked


def test_a_call_like_an_earlier_one_is_served_alike_without_asking(
    tried: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = asked(monkeypatch)
    tried.times.update(direct=1.0, ring=2.0, stock=2.0)
    x = torch.randn(200, 512, dtype=BF16)
    for number in range(3):
        tried.run(x + number, tried.weight, None)
    assert len(looked) == 1 and tried.ran[3:] == ["direct"] * 3
    tried.run(x, tried.weight, torch.zeros(512, dtype=BF16))
    assert len(looked) == 2, "another call: it has a bias"
    tried.buffer.split -= 4096
    tried.run(x, tried.weight, None)
    assert len(looked) == 3, "other bytes are remote"
    tried.prepared.holds = False
    tried.run(x, tried.weight, None)
    assert len(looked) == 4, "the window is another"
    tried.prepared.holds = True
    tried.chooser.switch(False)
    tried.run(x, tried.weight, None)
    assert len(looked) == 5, "trials are switched off"


def test_a_choice_that_is_not_made_yet_is_asked_for_again(
    tried: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = asked(monkeypatch)
    monkeypatch.setattr(tried.chooser._choices, "_capturing", lambda _: True)
    x = torch.randn(200, 512, dtype=BF16)
    for _ in range(2):
        tried.run(x, tried.weight, None)
    assert len(looked) == 2 and len(tried.ran) == 2, "no trial inside a capture, nothing kept"


def test_routes_are_bounded_and_keep_no_memory_alive(
    tried: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "MOST_ROUTES", 2)
    kept = routes.Routes()
    calls = [
        product.Product(
            torch.zeros(m, 512, dtype=BF16), (tried.weight,), (tried.buffer,), (None,), None,
            "none", "out_in",
        )
        for m in (1, 2, 3)
    ]  # fmt: skip
    for call in calls:
        kept.keep(call, "stock", call.facts().problem, None, 0, spared=False)
    assert kept.find(calls[0].key, 0, spared=False) is None
    assert kept.find(calls[2].key, 0, spared=False) is not None
    assert kept.find(calls[2].key, 0, spared=True) is None, "another way may be taken"
    assert kept.find(calls[2].key, 1, spared=False) is None, "trials have another state"
    assert kept.find(calls[2].key, 0, spared=False) is None, "and it is forgotten"
    found = kept.find(calls[1].key, 0, spared=False)
    assert found is not None and found.shape == (2, 512)
    assert [type(reference) for reference, _ in found.splits] == [weakref.ref]
    tried.buffer.usable = False
    assert kept.find(calls[1].key, 0, spared=False) is None, "it is another process's"
    tried.buffer.usable = True


def test_a_route_ends_where_a_local_weight_comes_to_lie_in_a_buffer(
    tried: SimpleNamespace,
) -> None:
    outside = torch.zeros(512, 512, dtype=BF16)
    call = product.Product(
        torch.zeros(200, 512, dtype=BF16), (tried.weight, outside), (tried.buffer, None),
        (None, None), None, "silu", "out_in",
    )  # fmt: skip
    kept = routes.Routes()
    kept.keep(call, "ring", call.facts().problem, None, 0, spared=False)
    assert kept.find(call.key, 0, spared=False) is not None

    class Late:
        address, nbytes, usable = outside.data_ptr(), outside.nbytes, True

    late: Any = Late()
    address_table.register(late)
    assert kept.find(call.key, 0, spared=False) is None
    address_table.forget(late)


def test_other_operands_take_the_long_way_and_marks_do_not(tried: SimpleNamespace) -> None:
    """It makes copies of what the kernel cannot read."""
    tried.times.update(direct=1.0, ring=2.0, stock=2.0)
    x = torch.randn(200, 512, dtype=BF16)
    names: list[str] = []

    @contextmanager
    def maker(name: str):
        names.append(name)
        yield

    tried.run(x, tried.weight, None)
    found = len(names)
    with MARKS.recorded(maker):
        tried.run(x, tried.weight, None)
    assert len(names) == found + 1 and names[-1].startswith("dak direct ")
    apart = torch.randn(200, 520, dtype=BF16)[:, :512]
    result = tried.run(apart, tried.weight, None)
    torch.testing.assert_close(result, F.linear(apart, tried.weight) + 1, rtol=0, atol=0)
    assert tried.ran[3:] == ["direct"] * 3


def test_what_the_ring_refuses_is_stock_without_a_trial(tried: SimpleNamespace) -> None:
    x = torch.randn(200, 512, dtype=BF16)
    options = {"biases": (x[0, :8],), "residual": None, "activation": "none", "layout": "out_in"}
    assert dispatch.run(x, (tried.weight,), **options) is None
    assert not tried.ran
