"""Times of one call from rounds of calls on equal operands that together outgrow the L2 cache.

Rounds are captured into one CUDA graph of at least a millisecond, so that what a graph launch costs
is shared by several calls, as in a model's step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dak_inductor.benchmarks.harness.timing import (
    REPLAYS,
    CapturedStep,
    Timing,
    TimingRule,
    capture,
    rotation_count,
    time_in_turn,
)

LEAST_GRAPH_SECONDS = 1e-3
MOST_ROUNDS = 16
COPIES_ON_CPU = 2

Round = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Rounds:
    """`calls` calls, to be run as one. `run` returns the output of the last."""

    run: Round | CapturedStep
    calls: int
    method: str

    def output(self) -> Tensor:
        """Of the last call, after a run of its own."""
        made = self.run()
        assert isinstance(made, Tensor)
        return made


def copies_needed(nbytes: int, device: torch.device) -> int:
    """Equal operands that a round must use so that none of them is found in the L2 cache."""
    if device.type != "cuda":
        return COPIES_ON_CPU
    return rotation_count(nbytes, torch.cuda.get_device_properties(device).L2_cache_size)


def make_rounds(round_: Round, calls: int, bound: float, *, device: torch.device) -> Rounds:
    """Rounds of `calls` calls that take at least `bound` seconds each."""
    if device.type != "cuda":
        return Rounds(round_, calls, "eager calls")
    count = max(1, min(MOST_ROUNDS, math.ceil(LEAST_GRAPH_SECONDS / (bound * calls))))

    def several() -> Tensor:
        for _ in range(count - 1):
            round_()
        return round_()

    return Rounds(capture(several, warmup=1), count * calls, REPLAYS)


def time_rounds(
    every: Sequence[Rounds], *, device: torch.device, rule: TimingRule
) -> tuple[Timing, ...]:
    """The time of one call of each, measured in turn: a card that grows hot slows all of them."""
    totals = time_in_turn([rounds.run for rounds in every], device=device, rule=rule)
    return tuple(
        Timing(
            total.seconds / rounds.calls,
            tuple(seconds / rounds.calls for seconds in total.repeats),
            total.replays * rounds.calls,
            rounds.method,
        )
        for rounds, total in zip(every, totals, strict=True)
    )
