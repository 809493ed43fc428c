"""Steps that leave their order, streams, memory, and whether `auto` chooses well."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch

import dak_inductor as dak
from dak_inductor.benchmarks.harness.timing import capture
from dak_inductor.budget import CONTEXT_GROWTH, MINIMUM_RESERVE
from dak_inductor.lowering.ahead import memory

from .ahead_blocks import (
    INNER,
    RATIO,
    STRATEGIES,
    WIDTH,
    Judge,
    expect,
    make,
    offloaded,
    run,
    steps_of,
)

pytestmark = pytest.mark.usefixtures("no_grad")


def derailing(monkeypatch: pytest.MonkeyPatch, at: int) -> Callable[[], None]:
    """From now on one played step takes its product `at` for another one."""
    from dak_inductor.lowering.ahead.step import PlayedStep

    real = PlayedStep._mismatch
    left = [1]

    def mismatch(self: PlayedStep, product: object) -> str:
        if self._next == at and left:
            left.pop()
            return "for the test"
        return real(self, product)  # type: ignore[arg-type]

    monkeypatch.setattr(PlayedStep, "_mismatch", mismatch)

    def check() -> None:
        assert not left, "no step was derailed"

    return check


@pytest.mark.parametrize("at", [0, 1, 4, 8])
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_a_derailed_step_is_right_and_joined(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, at: int, captured: bool
) -> None:
    model, expected = offloaded(device, "staged")
    x = expected.inputs(9)
    for _ in range(3):
        model(x)
    if captured:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        check = derailing(monkeypatch, at)
        with torch.cuda.graph(graph):  # raises where a copy is not joined
            output = model(x)
        for _ in range(3):
            x.copy_(expected.inputs(9))
            output.fill_(torch.nan)
            graph.replay()
            expected.check(output, x)
    else:
        check = derailing(monkeypatch, at)
        for _ in range(4):
            x = expected.inputs(9)
            expected.check(run(model, x), x)
    check()


def test_other_streams_take_turns(device: torch.device) -> None:
    model, expected = offloaded(device, "staged")
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream(priority=-1)]
    for number in range(12):
        stream = streams[number % 3]
        x = expected.inputs(9)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            output = model(x)
        torch.cuda.current_stream().wait_stream(stream)
        expected.check(output, x, f"call {number}")
        x.record_stream(stream)
    expect(model, "staged")


def test_weights_updated_in_place_between_steps(device: torch.device) -> None:
    model, _ = make(device)
    changed = copy.deepcopy(model)
    delta = torch.randn(WIDTH, INNER).bfloat16() * 0.01
    changed.blocks[1].down.weight.add_(delta)
    after = Judge(changed, device)
    dak.offload(model, offload_ratio=RATIO)
    model.compile(backend="dak", options={"strategy": "staged"})
    x = after.inputs(4)
    for _ in range(3):
        model(x)
    model.blocks[1].down.weight.add_(delta.to(device))
    after.check(run(model, x), x)


@pytest.mark.alone
def test_memory_stays_within_the_budget(device: torch.device) -> None:
    model, expected = make(device)
    model = model.to("cpu")
    del expected
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    budget = total - free + MINIMUM_RESERVE + CONTEXT_GROWTH + nbytes // 4
    dak.offload(model, gpu_memory=budget)
    model.compile(backend="dak", options={"strategy": "staged"})
    for tokens in (1, 1, 1, 1, 512, 512, 512):
        x = torch.randn(tokens, WIDTH, dtype=torch.bfloat16, device=device)
        for _ in range(6):
            model(x)
            free, total = torch.cuda.mem_get_info(device)
            assert total - free <= budget
    held = torch.cuda.memory_allocated()
    model(x)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= held, "a step keeps its ring"


def test_a_ring_that_has_no_room_is_not_taken(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dak_inductor import compiled_graph

    monkeypatch.setattr(compiled_graph, "ring_room", lambda *_: memory.Room(0))
    model, expected = offloaded(device, "staged")
    for _ in range(3):
        x = expected.inputs(5)
        expected.check(run(model, x), x)
    assert [step.staged for step in steps_of(model)] == [0]


def test_restored_models_are_forgotten(device: torch.device) -> None:
    model, expected = offloaded(device, "staged")
    x = expected.inputs(5)
    for _ in range(3):
        model(x)
    dak.restore(model, device=device)
    model._compiled_call_impl = None
    expected.check(model(x), x)


@pytest.mark.alone
@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.6])
def test_auto_is_near_the_faster_strategy(device: torch.device, share: float) -> None:
    seconds = {}
    for strategy in STRATEGIES:
        model, expected = offloaded(device, strategy, offload_ratio=share)
        x = expected.inputs(1)
        for _ in range(3):
            model(x)
        step = capture(lambda: model(x))  # noqa: B023
        found = []
        for _ in range(10):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(5):
                step()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 5e3)
        seconds[strategy] = sorted(found)[5]
        predicted = [(s.seconds, s.direct_seconds) for s in steps_of(model)]
        print(f"{share:.0%} {strategy}: {seconds[strategy] * 1e3:.3f} ms, predicted {predicted}")
        dak.restore(model)
        torch._dynamo.reset()
    assert seconds["auto"] < 1.1 * min(seconds.values())
