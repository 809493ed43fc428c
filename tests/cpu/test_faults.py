"""Faults inside steps, compiles and moves: a named error or recovery, and right answers after."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dak_inductor as dak
from dak_inductor import parts, placement
from dak_inductor.offloaded import record_of
from dak_inductor.session import SESSION

from .test_random_programs import recording

X = torch.randn(3, 64)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64))


def offloaded() -> tuple[nn.Sequential, torch.Tensor]:
    """A model, half of it remote, and what it answers to X."""
    SESSION.reset()
    model = network()
    with torch.no_grad():
        expected = model(X)
    return dak.offload(model, offload_ratio=0.5, remote="simulated"), expected


def answers(function: Callable[..., Any], expected: torch.Tensor) -> None:
    """The right values, with remote bytes read for them."""
    dak.stats(reset=True)
    with torch.no_grad():
        torch.testing.assert_close(function(X), expected, rtol=0, atol=1e-6)
    assert dak.stats().total.remote > 0


def test_an_exception_inside_a_step_is_the_users_and_the_next_step_is_right() -> None:
    model, expected = offloaded()
    fail = True

    @torch._dynamo.disable
    def check(x: torch.Tensor) -> None:
        if fail:
            raise LookupError("of the caller's own")

    def step(x: torch.Tensor) -> torch.Tensor:
        y = model[1](model[0](x))
        check(y)
        return model[2](y)

    compiled = torch.compile(step, backend=recording([]))
    for _ in range(3):
        with torch.no_grad(), pytest.raises(LookupError, match="own"):
            compiled(X)
    fail = False
    answers(compiled, expected)


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_a_step_that_fails_inside_its_graph_releases_the_launch_lock(
    kind: type[Exception],
) -> None:
    model, expected = offloaded()
    made: list[Any] = []
    compiled = torch.compile(model, backend=recording(made))
    answers(compiled, expected)
    run = made[0].run

    def broken(*_: object) -> None:
        raise kind("broken")

    made[0].run = broken
    with torch.no_grad(), pytest.raises((RuntimeError, MemoryError)):
        compiled(X)
    free: list[bool] = []

    def look() -> None:
        free.append(placement.LAUNCH_LOCK.acquire(timeout=5))
        if free[0]:
            placement.LAUNCH_LOCK.release()

    other = threading.Thread(target=look)
    other.start()
    other.join()
    assert free == [True]
    made[0].run = run


def test_a_compiler_that_fails_does_so_by_its_own_error_and_only_once() -> None:
    model, expected = offloaded()

    def refuse(*_: object) -> Any:
        raise ArithmeticError("no code today")

    from dak_inductor.backend import compile_graph
    from dak_inductor.options import BackendOptions

    def backend(graph: Any, given: Any) -> Any:
        return compile_graph(graph, given, BackendOptions(), refuse)

    with torch.no_grad(), pytest.raises(Exception, match="no code today"):
        torch.compile(model, backend=backend)(X)
    torch._dynamo.reset()
    answers(torch.compile(model, backend=recording([])), expected)


def test_a_reset_of_dynamo_compiles_again_and_keeps_what_is_offloaded() -> None:
    model, expected = offloaded()
    record = record_of(model)
    assert record is not None
    compiled = torch.compile(model, backend=recording([]))
    for _ in range(3):
        answers(compiled, expected)
        before = record.bytes_by_tier()
        torch._dynamo.reset()
        gc.collect()
        assert record_of(model) is record and record.bytes_by_tier() == before


def test_threads_compile_call_and_move_at_once() -> None:
    models = [offloaded() for _ in range(2)]
    errors: list[BaseException] = []
    stop = threading.Event()

    def call(number: int) -> None:
        model, expected = models[number % 2]
        try:
            for _ in range(4):
                compiled = torch.compile(copy.copy(model).forward, backend=recording([]))
                for _ in range(5):
                    with torch.no_grad():
                        torch.testing.assert_close(compiled(X), expected, rtol=0, atol=1e-6)
        except BaseException as error:
            errors.append(error)

    def move() -> None:
        turn = 0
        try:
            while not stop.is_set():
                for model, _ in models:
                    record = record_of(model)
                    assert record is not None
                    with placement.LAUNCH_LOCK:
                        for weight in record.weights.values():
                            weight.buffer.move((turn % 3) * weight.buffer.nbytes // 2)
                turn += 1
        except BaseException as error:
            errors.append(error)

    mover = threading.Thread(target=move)
    callers = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in (mover, *callers):
        thread.start()
    for thread in callers:
        thread.join()
    stop.set()
    mover.join()
    assert errors == []


def test_a_restore_that_fails_on_the_way_can_be_done_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, expected = offloaded()
    copied: list[Any] = []
    plain_copy = parts.plain_copy

    def second_fails(entry: Any, device: torch.device) -> None:
        if len(copied) == 1:
            raise MemoryError("no host memory")
        plain_copy(entry, device)
        copied.append(entry)

    monkeypatch.setitem(dak.restore.__globals__, "plain_copy", second_fails)
    with pytest.raises(MemoryError):
        dak.restore(model)
    monkeypatch.undo()
    with torch.no_grad():
        assert torch.equal(model(X), expected)
    dak.restore(model)
    assert record_of(model) is None and all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(X), expected)
