"""Time of one step: the median of several repeats of CUDA-graph replays, or of eager calls.

A step that touches less than a few L2 sizes must be given in several versions, on rotated inputs,
or the cache is measured: `rotation_count` says how many.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Step = Callable[[], object]
_Clock = Callable[[Step, int, torch.device], float]

REPLAYS = "CUDA graph replays"
"""The method of a figure whose steps were captured."""
L2_MULTIPLE = 3
"""Inputs are rotated until a round touches this many times the L2 size."""


@dataclass(frozen=True, slots=True)
class TimingRule:
    """How long to measure: `repeats` blocks that together take about `target_seconds`."""

    target_seconds: float = 2.0
    repeats: int = 3
    warmup: int = 3
    most_replays: int = 20_000

    def replays(self, estimate: float) -> int:
        """Calls per repeat for a step of `estimate` seconds, at least one."""
        block = self.target_seconds / self.repeats
        return max(1, min(self.most_replays, math.floor(block / max(estimate, 1e-7))))


QUICK = TimingRule(target_seconds=0.3)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one step: the median of `repeats` blocks of `replays` calls each."""

    seconds: float
    repeats: tuple[float, ...]
    replays: int
    method: str

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median block: differences below it are noise."""
        return (max(self.repeats) - min(self.repeats)) / self.seconds


def rotation_count(touched_bytes: int, l2_bytes: int) -> int:
    """Versions of a step on separate inputs so that one round outgrows the L2 cache."""
    if touched_bytes <= 0:
        raise ValueError(f"a step must touch bytes, got {touched_bytes}")
    return max(1, math.ceil(L2_MULTIPLE * l2_bytes / touched_bytes))


class CapturedStep:
    """A step recorded into a CUDA graph. Replays overwrite `output`, what the step returned."""

    def __init__(self, graph: torch.cuda.CUDAGraph, output: object) -> None:
        self.graph = graph
        self.output = output

    def __call__(self) -> object:
        self.graph.replay()
        return self.output


def capture(step: Step, *, warmup: int = 3) -> CapturedStep:
    """Record `step` into a CUDA graph of the current device after `warmup` calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    torch.cuda.synchronize()
    return CapturedStep(graph, output)


def time_calls(
    steps: Sequence[Step], *, device: torch.device, rule: TimingRule, method: str
) -> Timing:
    """Time rounds over `steps` (one per rotated input); seconds are per step, not per round."""
    if not steps:
        raise ValueError("no step to time")

    def run_round() -> None:
        for step in steps:
            step()

    (total,) = time_in_turn([run_round], device=device, rule=rule)
    blocks = tuple(seconds / len(steps) for seconds in total.repeats)
    return Timing(statistics.median(blocks), blocks, total.replays * len(steps), method)


def time_in_turn(
    steps: Sequence[Step], *, device: torch.device, rule: TimingRule
) -> tuple[Timing, ...]:
    """Time each step: a block of one after a block of the other, so that all see the card alike."""
    clock = _event_seconds if device.type == "cuda" else _wall_seconds
    counts = [_replays(step, clock, device, rule) for step in steps]
    blocks = [
        [clock(step, count, device) for step, count in zip(steps, counts, strict=True)]
        for _ in range(rule.repeats)
    ]
    return tuple(
        Timing(statistics.median(of_step), of_step, count, "")
        for of_step, count in zip(zip(*blocks, strict=True), counts, strict=True)
    )


def _replays(step: Step, clock: _Clock, device: torch.device, rule: TimingRule) -> int:
    """Calls of a block, after warm-up."""
    for _ in range(rule.warmup):
        step()
    count = rule.replays(clock(step, 1, device))
    if count > 3:  # a single call is a poor estimate of a short step
        count = rule.replays(clock(step, min(count, 10), device))
    return count


def synchronize(device: torch.device) -> None:
    """Wait for the work of a GPU; that of the CPU is done when it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _event_seconds(call: Step, count: int, device: torch.device) -> float:
    """Mean seconds of `count` calls on the device's clock."""
    with torch.cuda.device(device):
        start = torch.cuda.Event(enable_timing=True)
        stop = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(count):
            call()
        stop.record()
        torch.cuda.synchronize(device)
    return start.elapsed_time(stop) / 1e3 / count


def _wall_seconds(call: Step, count: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count
