"""Steps that are planned one way for CUDA graphs and another way for other calls."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from dak_inductor.lowering.ahead import planning
from dak_inductor.lowering.ahead.step_plan import StepPlans
from dak_inductor.lowering.linear.open_step import spares_host

from .ahead_model import BF16, shrink
from .test_ahead_step import Run, captured, three


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


def staged_in(monkeypatch: pytest.MonkeyPatch, *, captured: bool) -> None:
    """Plans stage products in captures alone, or outside of them alone."""
    real = planning.choose

    def chosen(*args, **options) -> StepPlans:
        staged = real(*args, **options)
        direct = real(*args, **{**options, "strategy": "direct"})
        if captured:
            return StepPlans(captured=staged.captured, eager=direct.eager)
        return StepPlans(captured=direct.captured, eager=staged.eager)

    monkeypatch.setattr(planning, "choose", chosen)


@pytest.mark.parametrize("in_captures", [True, False])
def test_calls_outside_of_captures_do_not_decide_for_them_nor_they_for_those(
    monkeypatch: pytest.MonkeyPatch, in_captures: bool
) -> None:
    staged_in(monkeypatch, captured=in_captures)
    run = Run(three())
    run()
    for capture in range(1, 4):
        assert run() == [not in_captures] * 3
        with monkeypatch.context() as patched:
            captured(patched, (0, capture))
            assert run() == [in_captures] * 3
    assert run.asked == 1, "planned once, for both"
    assert run.memory.ring.grew(), "weights make room for the ring of either"
    assert run.memory.ring.largest > 0 and not run.memory.ring.grew()


def test_cublas_has_its_handle_before_a_capture_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock products in parts may be in captures alone, and no capture can make the handle."""
    staged_in(monkeypatch, captured=True)
    made = list[int]()
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: made.append(1))
    run = Run(three())
    run()
    run()
    (known,) = run.memory._steps.values()
    assert known.plans is not None and known.plans.captured.staged
    run.memory._ready_for_captures(known.plans, torch.device("cpu"), in_this_call=False)
    assert not made
    run.memory._ready_for_captures(known.plans, torch.device("cuda", 0), in_this_call=True)
    assert made == [1]
    direct = StepPlans(captured=known.plans.eager, eager=known.plans.eager)
    run.memory._ready_for_captures(direct, torch.device("cuda", 0), in_this_call=False)
    assert made == [1]


def test_a_capture_after_a_move_is_planned_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    staged_in(monkeypatch, captured=True)
    layers = three()
    run = Run(layers)
    run()
    run()
    (buffer,) = layers[0].product(torch.zeros(1, 64, dtype=BF16)).buffers
    assert buffer is not None
    buffer.move(0)
    with monkeypatch.context() as patched:
        captured(patched, (0, 7))
        assert run() == [True] * 3
    assert run.asked == 1, "room is not asked for in a capture"


@pytest.mark.parametrize("spares", [True, False])
def test_products_spare_the_host_while_a_step_is_open_whose_plan_says_so(
    monkeypatch: pytest.MonkeyPatch, spares: bool
) -> None:
    real = planning.choose

    def chosen(*args, **options) -> StepPlans:
        plans = real(*args, **{**options, "strategy": "direct"})
        assert len(options["spared"]) == 3
        return replace(plans, eager=replace(plans.eager, spares_host=spares))

    monkeypatch.setattr(planning, "choose", chosen)
    run = Run(three())
    seen: list[bool] = []
    layer: Any = run.layers[1]

    def asking(x: torch.Tensor) -> Any:
        seen.append(spares_host())
        return layer(x)

    asking.expected = layer.expected  # type: ignore[attr-defined]
    run.layers[1] = asking  # type: ignore[assignment]
    run()
    run()
    with pytest.raises(KeyError):
        run(fail=True)
    assert seen == [False, spares, spares], "nothing is known at the first call"
    assert not spares_host()
    with run.memory.opened((), torch.device("cpu")):
        other = Run(three())
        with other.memory.opened((), torch.device("cpu")):
            assert not spares_host(), "of another graph nothing is known"
        assert spares_host() is spares
