"""When the stock operator serves a decode attention: what is measured, remembered and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dak_inductor.lowering.attention import trials
from dak_inductor.lowering.attention.operands import AttentionOperands
from dak_inductor.lowering.attention.problem import AttentionProblem
from dak_inductor.lowering.attention.trials import Kind, prefers_stock
from dak_inductor.lowering.choices import Choices
from dak_inductor.lowering.linear.trials import TRIALS

KIND = Kind(AttentionProblem(2, 2, 4, 1, 100, 64, torch.bfloat16), (2, 0, 1), "cpu", 0)
OPTIONS: dict[str, Any] = {
    "lengths": None, "starts": None, "mask": None, "scale": 0.125, "causal": True, "window": 0,
    "softcap": 0.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = TRIALS.enabled
    TRIALS.switch(True)
    monkeypatch.setattr(trials, "CHOICES", Choices(capturing=lambda _: False))
    yield
    TRIALS.switch(before)


def measured(
    seconds: tuple[float, float] | None, calls: list[int]
) -> Callable[[], tuple[float, float] | None]:
    def measure() -> tuple[float, float] | None:
        calls.append(1)
        return seconds

    return measure


@pytest.mark.parametrize(
    ("seconds", "stock"),
    [((1.0, 0.9), True), ((1.0, 0.996), False), ((1.0, 1.2), False), (None, False)],
)
def test_a_kind_is_measured_once(seconds: tuple[float, float] | None, stock: bool) -> None:
    calls = list[int]()
    assert prefers_stock(KIND, measured(seconds, calls)) is stock
    assert prefers_stock(KIND, measured((1.0, 2.0), calls)) is stock
    assert len(calls) == 1


def test_nothing_is_measured_in_a_capture_or_while_trials_are_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capturing, calls = [True], list[int]()
    monkeypatch.setattr(trials, "CHOICES", Choices(capturing=lambda _: capturing[0]))
    faster = measured((1.0, 0.5), calls)
    assert not prefers_stock(KIND, faster) and not calls
    capturing[0] = False
    assert prefers_stock(KIND, faster) and len(calls) == 1
    capturing[0] = True
    assert prefers_stock(KIND, faster), "what was measured before holds in a capture"
    TRIALS.switch(False)
    assert not prefers_stock(KIND, faster) and len(calls) == 1


def test_want_of_memory_leaves_the_kernel() -> None:
    def measure() -> tuple[float, float]:
        raise torch.OutOfMemoryError

    assert not prefers_stock(KIND, measure)
    assert not prefers_stock(KIND, measured((1.0, 0.5), []))


def test_a_call_within_a_trial_gets_the_kernel() -> None:
    inner: list[bool] = []

    def measure() -> tuple[float, float]:
        inner.append(prefers_stock(KIND, measured((1.0, 0.5), [])))
        return (1.0, 0.5)

    assert prefers_stock(KIND, measure) and inner == [False]


def test_only_whole_views_without_masks_have_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(2, 8, 1, 64)
    key, value = torch.randn(2, 2, 100, 64), torch.randn(2, 2, 100, 64)
    kernel = torch.zeros(2, 8, 1, 64)
    counted: list[str] = []
    monkeypatch.setattr(trials.dispatch, "run", lambda *_, **__: kernel)
    monkeypatch.setattr(trials, "kind_of", lambda *_: KIND)
    monkeypatch.setattr(trials.reads, "count_dense", lambda kind, *_: counted.append(kind))
    prefers_stock(KIND, measured((1.0, 0.5), []))

    def run(**other: Any) -> torch.Tensor | None:
        return trials.run(AttentionOperands(query, key, value, **{**OPTIONS, **other}))

    found = run()
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, scale=0.125, enable_gqa=True
    )
    assert found is not None and torch.allclose(found, expected, atol=1e-5)
    assert counted == ["attention"]
    bound = torch.full((2,), 50, dtype=torch.int32)
    for other in (
        {"lengths": bound}, {"starts": bound}, {"mask": torch.ones(100, dtype=torch.bool)},
        {"window": 60}, {"softcap": 30.0},
    ):  # fmt: skip
        assert run(**other) is kernel, other
    assert run(window=100) is not kernel
    assert counted == ["attention"] * 2


def test_operands_elsewhere_are_of_no_kind() -> None:
    query, cache = torch.randn(2, 8, 1, 64), torch.randn(2, 2, 100, 64)
    assert trials.kind_of(AttentionOperands(query, cache, cache, **OPTIONS)) is None
