"""Copies ahead inside CUDA graphs that Inductor captures (`mode="reduce-overhead"`)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dak_inductor as dak
from dak_inductor.benchmarks.harness.linear_reference import poison_free_memory
from dak_inductor.copy_ring import RING_BYTES
from dak_inductor.cuda_runtime.current_stream import current_capture
from dak_inductor.lowering.ahead import player
from dak_inductor.options import Strategy

from .ahead_blocks import (
    RATIO,
    Block,
    Blocks,
    Judge,
    assert_read_once,
    expect,
    make,
    move_all,
    steps_of,
)
from .test_ahead_order import derailing

pytestmark = pytest.mark.usefixtures("no_grad", "checked_pools")
CALLS = 3
"""Of one shape until it is replayed: warmed up, captured, replayed."""


@pytest.fixture
def checked_pools():
    """Inductor looks for memory in its pool that none of its graphs accounts for."""
    with torch._inductor.config.patch({"triton.slow_path_cudagraph_asserts": True}):
        yield
    torch._dynamo.reset()


def compiled(
    device: torch.device, strategy: Strategy = "staged", remote: str = "cpu", **more
) -> tuple[nn.Module, Judge]:
    model, expected = make(device)
    dak.offload(model, remote=remote, offload_ratio=RATIO)
    options = {"strategy": strategy, "mode": "reduce-overhead"}
    model.compile(backend="dak", options=options, dynamic=False, **more)
    return model, expected


def check(model: nn.Module, expected: Judge, tokens: int, calls: int = 2) -> None:
    """Calls with fresh inputs, whose ring and outputs hold NaN before those that are captured."""
    for number in range(calls):
        x = expected.inputs(tokens)
        poison_free_memory(RING_BYTES, x.device, blocks=2)
        torch.compiler.cudagraph_mark_step_begin()
        expected.check(model(x).clone(), x, f"{tokens} tokens, call {number}")


@pytest.mark.parametrize("strategy", ["staged", "auto", "direct"])
@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_replays_are_right_and_read_each_byte_once(
    device: torch.device, remote: str, strategy: Strategy, tokens: int
) -> None:
    model, expected = compiled(device, strategy, remote)
    check(model, expected, tokens, CALLS + 2)
    expect(model, strategy)
    dak.stats(reset=True)
    check(model, expected, tokens, 3)
    assert_read_once(model, strategy, 3)


def test_the_copies_are_captured(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of products that are staged; none of products that are read directly."""
    captured: list[bool] = []
    real = player.copy_bytes

    def noted(*arguments: int | torch.device) -> None:
        captured.append(current_capture(device) != 0)
        real(*arguments)

    monkeypatch.setattr(player, "copy_bytes", noted)
    for strategy, wanted in (("staged", True), ("direct", False)):
        captured.clear()
        model, expected = compiled(device, strategy)
        check(model, expected, 9, CALLS + 1)
        assert any(captured) == wanted, strategy


def test_moved_splits_leave_replays_right(device: torch.device) -> None:
    model, expected = compiled(device)
    check(model, expected, 9, CALLS)
    for share in (1.0, 0.1, 0.6):
        move_all(model, share)
        check(model, expected, 9, 3)


def test_shapes_and_models_take_turns(device: torch.device) -> None:
    """In one tree of graphs, whose pool they share."""
    first, second = compiled(device), compiled(device, "auto")
    for _ in range(CALLS + 2):
        for model, expected in (first, second):
            for tokens in (9, 2, 600):
                check(model, expected, tokens, 1)
    for model, _ in (first, second):
        assert not any(step.off for step in steps_of(model))
    expect(first[0], "staged")


@pytest.mark.parametrize("at", [0, 1, 4, 8])
def test_a_step_that_derails_while_it_is_captured(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    model, expected = compiled(device)
    check(model, expected, 9, 1)
    was_derailed = derailing(monkeypatch, at)
    check(model, expected, 9, 5)
    was_derailed()


@torch.library.custom_op("dak_tests::cut", mutates_args=(), tags=(torch._C.Tag.cudagraph_unsafe,))
def cut(x: Tensor) -> Tensor:
    """What no CUDA graph may have: Inductor makes one of what is before, one of what follows."""
    return x.clone()


@cut.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class CutBlocks(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 1:
                x = cut(x)
        return x


def test_a_graph_that_inductor_cuts_is_not_staged(device: torch.device) -> None:
    model = CutBlocks().bfloat16()
    expected = Judge(model, device)
    dak.offload(model, offload_ratio=RATIO)
    options = {"strategy": "staged", "mode": "reduce-overhead", "graph_partition": True}
    model.compile(backend="dak", options=options, dynamic=False)
    check(model, expected, 9, CALLS + 2)
    (step,) = steps_of(model)
    assert step.staged == 0 and "several" in step.off


def test_blocks_that_are_compiled_one_by_one(device: torch.device) -> None:
    """Each has a step of its own, and a graph."""
    model, expected = make(device)
    dak.offload(model, offload_ratio=RATIO)
    options = {"strategy": "staged", "mode": "reduce-overhead"}
    for block in model.blocks:
        assert isinstance(block, Block)
        block.compile(backend="dak", options=options, dynamic=False)
    check(model, expected, 9, CALLS + 2)
    assert not any(step.off for step in steps_of(model))
