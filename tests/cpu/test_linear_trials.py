"""Choosing the way of a product: kinds of calls, candidates, the rule, when it measures, counts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dak_inductor as dak
from dak_inductor import compiled_graph, hardware, trial_report
from dak_inductor.backend import compile_graph
from dak_inductor.lowering import choices, host_cost
from dak_inductor.lowering.choices import fastest
from dak_inductor.lowering.linear import (
    trials,
    ways,
)
from dak_inductor.lowering.linear.call_facts import CallFacts, kind_of, remote_step, token_step
from dak_inductor.lowering.linear.configuration import MAXIMUM_TOKENS
from dak_inductor.lowering.linear.problem import LinearProblem
from dak_inductor.lowering.linear.trials import Trial, Trials, is_sure
from dak_inductor.lowering.linear.ways import Way, ways_of
from dak_inductor.options import BackendOptions

BF16 = torch.bfloat16
H200 = hardware.load("h200")
DIRECT, RING, STOCK = Way("direct", 100e-6), Way("ring", 120e-6), Way("stock")


def facts_of(m: int = 1, n: int = 8192, k: int = 8192, remote: int = 1 << 20) -> CallFacts:
    return CallFacts(LinearProblem(m, n, k, BF16), (remote,), "cpu", 0)


# --- kinds of calls ---


def test_tokens_step_by_tiles_and_by_the_root_of_two() -> None:
    steps = [8, 16, 32, 64, 128, 182, 256, 363, 512, 725, 1024, 1449, 2048, 2897, 4096]
    assert sorted({token_step(m) for m in range(1, MAXIMUM_TOKENS + 1)}) == steps
    for m in steps:
        assert token_step(m) == m or m > 128
    for boundary in (128, ways.STOCK_TOKENS, MAXIMUM_TOKENS):
        assert token_step(boundary) == boundary < token_step(boundary + 1)


@given(st.integers(1, 4096), st.integers(0, 2**40))
def test_steps_are_short_and_round_up(m: int, nbytes: int) -> None:
    assert m <= token_step(m) <= max(8, 2 * m - 1, 1.4143 * m + 1)
    assert nbytes <= remote_step(nbytes) <= 1.3 * nbytes + 1
    assert token_step(m) <= token_step(m + 1) and remote_step(nbytes) <= remote_step(nbytes + 1)


def test_a_kind_has_all_that_time_depends_on() -> None:
    call = facts_of()
    same = replace(call, problem=replace(call.problem, m=8), remote_bytes=(call.remote_bytes[0],))
    assert kind_of(call) == kind_of(same)
    problem = call.problem
    others = [
        replace(call, problem=replace(problem, m=9)),
        replace(call, problem=replace(problem, n=4096)),
        replace(call, problem=replace(problem, k=4096)),
        replace(call, problem=replace(problem, dtype=torch.float16)),
        replace(call, problem=replace(problem, gated=True)),
        replace(call, problem=replace(problem, in_out=True)),
        replace(call, remote_bytes=(0,)),
        replace(call, remote_bytes=(3 << 20,)),
        replace(call, tier="cuda:1"),
        replace(call, device_index=1),
        replace(call, activation="silu"),
        replace(call, bias=True),
        replace(call, residual=True),
        replace(call, in_graph=True),
    ]
    assert len({kind_of(each) for each in (call, *others)}) == len(others) + 1


def test_a_call_is_named_with_its_shape_and_share() -> None:
    call = replace(facts_of(), activation="silu", residual=True)
    text = "8192x8192 [out, in] bfloat16 silu residual, M=1, 0.78% remote, cuda:0 and cpu"
    assert str(call) == text


# --- candidates ---


def names(m: int, remote: int, n: int = 8192, k: int = 8192) -> list[str]:
    facts = CallFacts(LinearProblem(m, n, k, BF16), (remote,), "cpu", 0)
    return [way.name for way in ways_of(facts)]


def test_the_ways_by_tokens(h200: None) -> None:
    for remote in (0, 1 << 20):
        for m in (1, 8, 128):
            assert names(m, remote) == ["direct", "stock"]
        for m in (513, 4096):
            assert sorted(names(m, remote)) == ["direct", "ring"]
        assert names(4097, remote) == ["ring"]
    for m in (129, 512):
        assert sorted(names(m, 1 << 20)) == ["direct", "ring", "stock"]
        assert sorted(names(m, 0)) == ["direct", "ring"], "stock is what the ring does in place"


def test_the_estimates_choose_as_they_say(h200: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for staged in (False, True):
        monkeypatch.setattr(ways, "prefers_ring", lambda *_, staged=staged: staged)
        ways_of.cache_clear()
        assert names(1024, 1 << 24) == (["ring", "direct"] if staged else ["direct", "ring"])


def test_without_a_configuration_the_ring_is_first(
    h200: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways, "choose", lambda *_, **__: None)
    assert names(1, 1 << 20) == ["ring", "stock"]
    assert names(2048, 1 << 20) == ["ring"]


# --- the rule ---


def test_a_gain_below_the_least_changes_nothing() -> None:
    assert fastest([100.0, 99.6]) == 0
    assert fastest([100.0, 99.4]) == 1
    assert fastest([100.0, 80.0, 70.0]) == 2
    assert fastest([70.0, 80.0, 100.0]) == 0


def test_only_far_estimates_of_all_ways_are_believed() -> None:
    assert is_sure([DIRECT, Way("ring", 201e-6)])
    assert not is_sure([DIRECT, RING])
    assert not is_sure([DIRECT, Way("ring", 1.0), STOCK]), "nothing is known of stock kernels"


class Clock:
    """Stands for the measurement: times by name, and how often it was asked."""

    def __init__(self, offered: Sequence[Way], **microseconds: float) -> None:
        self.offered, self.microseconds, self.calls = offered, microseconds, 0

    def __call__(self) -> list[float]:
        self.calls += 1
        return [self.microseconds[way.name] * 1e-6 for way in self.offered]


@pytest.fixture
def chooser() -> Trials:
    made = Trials(capturing=lambda _: False)
    made.switch(True)
    return made


def test_the_first_call_measures_and_the_choice_stays(
    chooser: Trials, caplog: pytest.LogCaptureFixture
) -> None:
    offered = (DIRECT, STOCK)
    with caplog.at_level(logging.INFO, trials.__name__):
        clock = Clock(offered, direct=157, stock=127)
        assert chooser.choose(facts_of(), offered, clock) is STOCK
    assert caplog.messages == [f"{facts_of()}: direct 157.0 us, stock 127.0 us; stock is taken"]
    later = Clock(offered, direct=1, stock=1000)
    assert chooser.choose(facts_of(m=5), offered, later) is STOCK
    assert (clock.calls, later.calls) == (1, 0)
    (trial,) = chooser.results()
    assert trial.chosen == "stock" and trial.call == facts_of()
    assert chooser.choose(facts_of(m=9), offered, later) is DIRECT
    assert later.calls == 1 and len(chooser.results()) == 2


def test_the_stock_operator_must_gain_what_it_costs_in_a_step(chooser: Trials) -> None:
    ways = (Way("direct", 9e-6), Way("stock"))
    call = facts_of(n=1024, k=4096)
    assert chooser.choose(call, ways, Clock(ways, direct=9.0, stock=7.8)).name == "direct"
    larger = facts_of(n=4096, k=4096)
    assert chooser.choose(larger, ways, Clock(ways, direct=15.0, stock=11.0)).name == "stock"
    assert chooser.results()[0].seconds == (("direct", 9e-6), ("stock", 7.8e-6))  # as measured
    between = replace(call, in_graph=True)
    assert chooser.choose(between, ways, Clock(ways, direct=9.0, stock=7.8)).name == "stock"


def test_where_the_host_is_slower_it_is_spared(chooser: Trials) -> None:
    """A ring of its own takes the host longer than one launch."""
    offered = (RING, DIRECT, STOCK)
    call = facts_of(m=512)
    assert chooser.choose(call, offered, Clock(offered, ring=20, direct=60, stock=65)) is RING
    assert chooser.sparing(call, offered) is DIRECT
    (trial,) = chooser.results()
    assert trial.taken == "ring; direct where the host is slower than the GPU"
    large = facts_of(m=2048)
    chooser.choose(large, offered[:2], Clock(offered[:2], ring=500, direct=900))
    assert chooser.sparing(large, offered[:2]) is RING
    assert chooser.results()[1].taken == "ring"


def test_what_follows_a_stock_product_takes_the_host_too(chooser: Trials) -> None:
    """The kernel has it fused."""
    local = replace(facts_of(m=512), remote_bytes=(0,))
    fused = replace(local, activation="gelu", residual=True)
    times = {"ring": 20, "direct": 40, "stock": 21}
    for call, way in ((local, RING), (fused, DIRECT)):
        offered = (RING, DIRECT, STOCK)
        assert chooser.choose(call, offered, Clock(offered, **times)) is RING
        assert chooser.sparing(call, offered) is way
    gated = replace(local, problem=replace(local.problem, gated=True), activation="silu")
    more = [host_cost.following_seconds(call) for call in (local, fused, gated)]
    assert more == pytest.approx([each * host_cost.FOLLOWING_SECONDS for each in (0, 2, 3)])


def test_without_a_trial_the_host_is_spared_by_estimates() -> None:
    chooser = Trials(capturing=lambda _: False)
    chooser.switch(False)
    ring, kernel = Way("ring", 20e-6), Way("direct", 60e-6)
    assert chooser.sparing(facts_of(m=512), (ring, kernel, STOCK)) is kernel
    assert chooser.sparing(facts_of(m=512), (STOCK, ring)) is ring, "of stock nothing is known"
    assert chooser.sparing(facts_of(m=512), (Way("ring", 1.0), Way("direct", 2.0))).name == "ring"
    local = replace(facts_of(m=512), remote_bytes=(0,))
    even = Way("ring", 20e-6), Way("direct", 100e-6)
    assert chooser.sparing(local, even).name == "ring", "with nothing to copy it is one launch"
    assert chooser.sparing(facts_of(m=512), even).name == "direct"


def test_a_way_that_a_later_call_lacks_gives_the_estimates_choice(chooser: Trials) -> None:
    call = facts_of(m=1024)
    assert chooser.choose(call, (RING, DIRECT), Clock((RING, DIRECT), ring=9, direct=1)) is DIRECT
    assert chooser.choose(call, (RING, Way("stock")), Clock((), ring=0)) is RING


def test_what_is_not_measured(chooser: Trials) -> None:
    clock = Clock((DIRECT,), direct=1)
    assert chooser.choose(facts_of(), (DIRECT,), clock) is DIRECT
    sure = (DIRECT, Way("ring", 1.0))
    assert chooser.choose(facts_of(), sure, clock) is DIRECT
    assert chooser.choose(facts_of(), (RING, DIRECT), clock) is DIRECT, "remembered as well"
    assert clock.calls == 0 and not chooser.results()


def test_a_capture_gets_the_estimate_and_a_later_call_measures() -> None:
    capturing = True
    chooser = Trials(capturing=lambda _: capturing)
    chooser.switch(True)
    offered = (DIRECT, STOCK)
    clock = Clock(offered, direct=157, stock=127)
    assert chooser.choose(facts_of(), offered, clock) is DIRECT and clock.calls == 0
    capturing = False
    assert chooser.choose(facts_of(), offered, clock) is STOCK and clock.calls == 1
    capturing = True
    assert chooser.choose(facts_of(), offered, clock) is STOCK and clock.calls == 1


def test_switched_off_estimates_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    offered = (DIRECT, STOCK)
    clock = Clock(offered, direct=157, stock=127)
    monkeypatch.setenv("DAK_TRIALS", "0")
    chooser = Trials(capturing=lambda _: False)
    assert chooser.choose(facts_of(), offered, clock) is DIRECT and clock.calls == 0
    chooser.switch(True)
    assert chooser.choose(facts_of(), offered, clock) is STOCK
    chooser.switch(False)
    assert chooser.choose(facts_of(), offered, clock) is DIRECT


def test_one_trial_of_a_kind_whichever_thread_comes_first(chooser: Trials) -> None:
    offered = (DIRECT, STOCK)
    entered, leave = threading.Event(), threading.Event()
    calls = []

    def slow() -> list[float]:
        calls.append(threading.get_ident())
        entered.set()
        assert leave.wait(30)
        return [157e-6, 127e-6]

    found: list[Way] = []
    first = threading.Thread(target=lambda: found.append(chooser.choose(facts_of(), offered, slow)))
    first.start()
    assert entered.wait(30)
    others = [
        threading.Thread(target=lambda: found.append(chooser.choose(facts_of(), offered, slow)))
        for _ in range(8)
    ]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join(30)
    assert found == [DIRECT] * 8, "they do not wait for it"
    leave.set()
    first.join(30)
    assert found[-1] is STOCK and len(calls) == 1
    assert chooser.choose(facts_of(), offered, slow) is STOCK and len(calls) == 1


def test_failures(chooser: Trials, caplog: pytest.LogCaptureFixture) -> None:
    offered = (DIRECT, STOCK)
    clock = Clock(offered, direct=157, stock=127)

    def fail(error: Exception):
        def measure() -> list[float]:
            raise error

        return measure

    with pytest.raises(ValueError, match="of an operand"):
        chooser.choose(facts_of(), offered, fail(ValueError("of an operand")))
    assert chooser.choose(facts_of(), offered, clock) is STOCK, "the next call measures"
    with caplog.at_level(logging.INFO, choices.__name__):
        full = fail(torch.OutOfMemoryError("full"))
        assert chooser.choose(facts_of(m=128), offered, full) is DIRECT
    assert "want of memory" in caplog.text
    assert chooser.choose(facts_of(m=128), offered, clock) is DIRECT and clock.calls == 1


def test_kinds_are_bounded(chooser: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "MOST_KINDS", 2)
    offered = (DIRECT, STOCK)
    clock = Clock(offered, direct=157, stock=127)
    found = [chooser.choose(facts_of(n=8 * n), offered, clock).name for n in (1, 2, 3, 1)]
    assert found == ["stock", "stock", "direct", "stock"] and clock.calls == 2


# --- what users see ---


def test_explain_shows_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tuple(
        Trial(replace(facts_of(), tier=tier), (("direct", 157e-6), ("stock", 127e-6)), "stock")
        for tier in ("cpu", "cuda:1")
    )
    monkeypatch.setattr(trials, "results", lambda: found)
    assert trial_report.trials_of(torch.device("cuda", 0), "cpu") == found[:1]
    assert trial_report.trials_of(torch.device("cuda", 1), "cpu") == ()
    assert trial_report.trials_of(torch.device("cpu"), "simulated") == ()
    model = dak.offload(torch.nn.Linear(256, 256), offload_ratio=0.5, remote="simulated")
    assert "measured products" not in str(dak.explain(model))
    text = str(replace(dak.explain(model), trials=found))
    assert "measured products" in text and "direct 157.0 us, stock 127.0 us" in text


def test_the_option_switches_when_a_graph_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dak.offload(torch.nn.Linear(256, 256), offload_ratio=0.5, remote="simulated")
    chooser = Trials()
    monkeypatch.setattr(compiled_graph, "TRIALS", chooser)
    x = torch.randn(3, 256)
    for option, expected in ((None, True), (False, False), (None, False), (True, True)):
        torch._dynamo.reset()

        def backend(graph, arguments, option=option):
            settings = BackendOptions(trials=option)
            return compile_graph(graph, arguments, settings, lambda graph, _: graph.forward)

        with torch.no_grad():
            torch.compile(model, backend=backend)(x)
        assert chooser.enabled is expected
