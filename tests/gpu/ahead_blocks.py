"""Offloaded blocks for tests of copies ahead, and their judge."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import dak_inductor as dak
from dak_inductor.ahead_report import StepStrategy
from dak_inductor.benchmarks.harness.accuracy import errors, judge
from dak_inductor.benchmarks.harness.linear_reference import poison_free_memory
from dak_inductor.copy_ring import RING_BYTES
from dak_inductor.offloaded import record_of
from dak_inductor.options import Strategy
from dak_inductor.placement import LAUNCH_LOCK

WIDTH, INNER, DEPTH = 2048, 5632, 3
STRATEGIES: tuple[Strategy, ...] = ("staged", "auto", "direct")
RATIO = 0.4

strategies = pytest.mark.parametrize("strategy", STRATEGIES)


class Block(nn.Module):
    """A product with a bias, a gated one with SiLU, and one with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, INNER, bias=False)
        self.up = nn.Linear(WIDTH, INNER, bias=False)
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.layer_norm(x + self.mix(x), (WIDTH,))
        return x + self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Judge:
    """Fresh random inputs, and outputs against fp32 by what torch's own dtype makes of them."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._own = copy.deepcopy(model).to(device)
        self._exact = copy.deepcopy(model).to(device, torch.float32)
        self._device = device

    def inputs(self, tokens: int) -> Tensor:
        return torch.randn(tokens, WIDTH, dtype=torch.bfloat16, device=self._device)

    def check(self, output: Tensor, x: Tensor, what: object = "") -> None:
        exact = self._exact(x.float())
        verdict = judge(errors(output, exact), errors(self._own(x), exact))
        assert verdict.passed, f"{what}: {verdict}"


def make(device: torch.device, *, dtype: torch.dtype = torch.bfloat16) -> tuple[Blocks, Judge]:
    model = Blocks().to(dtype)
    return model, Judge(model, device)


def offloaded(
    device: torch.device, strategy: Strategy, remote: str = "cpu", *, dynamic: bool = False, **more
) -> tuple[nn.Module, Judge]:
    model, judge_ = make(device)
    request = {"offload_ratio": RATIO} | more
    dak.offload(model, remote=remote, **request)
    model.compile(backend="dak", options={"strategy": strategy}, dynamic=dynamic)
    return model, judge_


def steps_of(model: nn.Module) -> tuple[StepStrategy, ...]:
    return dak.explain(model).strategies


def expect(model: nn.Module, strategy: Strategy) -> None:
    """Which strategy the products had; that of `auto` is for the estimates to say."""
    steps = steps_of(model)
    assert bool(steps) == (strategy != "direct")
    assert not any(step.off for step in steps), steps
    if strategy == "staged":
        assert all(step.staged > 0 for step in steps), steps
        direct = {op.reason for step in steps for op in step.ops if op.strategy == "direct"}
        assert direct <= {"nothing of it is remote"}


def run(model: nn.Module, x: Tensor) -> Tensor:
    """A call whose ring and outputs hold NaN before it."""
    poison_free_memory(RING_BYTES, x.device, blocks=2)
    poison_free_memory(x.numel() * 2, x.device)
    output = model(x)
    assert isinstance(output, Tensor)
    return output


def move_all(model: nn.Module, share: float) -> None:
    record = record_of(model)
    assert record is not None
    with LAUNCH_LOCK:
        torch.cuda.synchronize()
        for weight in record.weights.values():
            weight.buffer.move(round((1 - share) * weight.buffer.nbytes))


def assert_read_once(model: nn.Module, what: object, calls: int = 1) -> None:
    """What was counted since the last reset: each byte once, but for rows that a split cuts."""
    torch.cuda.synchronize()
    record = record_of(model)
    assert record is not None
    held, read = record.bytes_by_tier(), dak.stats().total
    assert read.total == calls * held.total, what
    cut = calls * len(record.weights) * 2 * INNER
    assert abs(read.remote - calls * held.remote) <= cut, what
