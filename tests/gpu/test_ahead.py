"""Steps whose remote bytes are copied ahead: values, captured graphs, moved splits, counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dak_inductor as dak
from dak_inductor.benchmarks.harness.accuracy import poison
from dak_inductor.benchmarks.harness.linear_reference import poison_free_memory
from dak_inductor.benchmarks.harness.timing import CapturedStep, capture
from dak_inductor.copy_ring import RING_BYTES
from dak_inductor.options import Strategy

from .ahead_blocks import (
    RATIO,
    assert_read_once,
    expect,
    move_all,
    offloaded,
    run,
    steps_of,
    strategies,
)

pytestmark = pytest.mark.usefixtures("no_grad")


@strategies
@pytest.mark.parametrize("tokens", [1, 7, 128, 640, 5000])
def test_eager_calls(device: torch.device, remote: str, strategy: Strategy, tokens: int) -> None:
    model, expected = offloaded(device, strategy, remote)
    for number in range(5):
        x = expected.inputs(tokens)
        expected.check(run(model, x), x, f"call {number}")
    expect(model, strategy)


@strategies
@pytest.mark.parametrize("tokens", [1, 640])
def test_captured_graphs_survive_moved_splits(
    device: torch.device, remote: str, strategy: Strategy, tokens: int
) -> None:
    model, expected = offloaded(device, strategy, remote)
    x = expected.inputs(tokens)
    for _ in range(3):
        model(x)
    poison_free_memory(RING_BYTES, device)
    step = capture(lambda: model(x))
    expect(model, strategy)
    for share in (RATIO, 1.0, 0.0, 0.05, 0.7):
        move_all(model, share)
        x.copy_(expected.inputs(tokens))
        poison(step.output)
        dak.stats(reset=True)
        output = step()
        torch.cuda.synchronize()
        assert isinstance(output, Tensor)
        expected.check(output, x, f"{share:.0%} remote")
        assert_read_once(model, f"{share:.0%} remote")
        again = run(model, x)
        expected.check(again, x, f"{share:.0%} remote, eager")


@strategies
def test_decode_and_prefill_of_one_dynamic_graph(device: torch.device, strategy: Strategy) -> None:
    model, expected = offloaded(device, strategy, dynamic=True)
    for _ in range(4):
        for tokens in (5, 300, 33):
            x = expected.inputs(tokens)
            expected.check(run(model, x), x, f"{tokens} tokens")
    if strategy == "staged":
        assert {step.tokens for step in steps_of(model)} == {"5 tokens", "300 tokens", "33 tokens"}
    expect(model, strategy)


@pytest.mark.parametrize("tokens", [1, 640])
def test_each_byte_is_read_once(device: torch.device, remote: str, tokens: int) -> None:
    model, expected = offloaded(device, "staged", remote)
    x = expected.inputs(tokens)
    for _ in range(3):
        model(x)
    dak.stats(reset=True)
    for _ in range(3):
        run(model, x)
    assert_read_once(model, tokens, calls=3)


def test_two_graphs_share_a_device(device: torch.device) -> None:
    pairs = [offloaded(device, "staged") for _ in range(2)]
    inputs = [judge_.inputs(16) for _, judge_ in pairs]
    for _ in range(4):
        for (model, judge_), x in zip(pairs, inputs, strict=True):
            judge_.check(run(model, x), x)
    # torch captures on one stream by default, and cuBLAS's workspace belongs to the stream
    streams = [torch.cuda.Stream() for _ in pairs]
    captured = []
    for (model, _), x, stream in zip(pairs, inputs, streams, strict=True):
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            output = model(x)
        captured.append(CapturedStep(graph, output))
    for _ in range(10):
        torch.cuda.synchronize()
        for step, stream in zip(captured, streams, strict=True):
            poison(step.output)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
        eager = [run(model, x) for (model, _), x in zip(pairs, inputs, strict=True)]
        torch.cuda.synchronize()
        for step, output, (_, judge_), x in zip(captured, eager, pairs, inputs, strict=True):
            assert isinstance(step.output, Tensor)
            judge_.check(step.output, x, "replay")
            judge_.check(output, x, "eager")
    for model, _ in pairs:
        expect(model, "staged")
