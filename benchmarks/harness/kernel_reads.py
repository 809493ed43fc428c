"""Bytes that kernels count while they run, read from the records of tiered buffers.

On a CUDA device kernels add to a record in device memory; on the simulated tier the operators count
on the host, by the buffer's label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from dak_inductor.benchmarks.harness.timing import synchronize
from dak_inductor.cuda_runtime.device_records import RecordCounters
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.lowering import counters

Result = TypeVar("Result")


class ReadCounter:
    """The counts of some buffers since `reset`. The caller sees to it that no kernel is running."""

    def __init__(self, buffers: Sequence[TieredBuffer]) -> None:
        self.buffers = tuple(buffers)
        self._records = [getattr(buffer, "record", None) for buffer in self.buffers]

    def reset(self) -> None:
        counters.reset()
        for record in self._records:
            if record is not None:
                record.reset()

    def read(self) -> RecordCounters | None:
        """Sums over the buffers and the largest window; None where a buffer has no counter."""
        found = [r.counters().since(r.base) for r in self._records if r is not None]
        if len(found) < len(self.buffers):
            return self._simulated()
        return RecordCounters(
            local_bytes=sum(each.local_bytes for each in found),
            remote_bytes=sum(each.remote_bytes for each in found),
            calls=sum(each.calls for each in found),
            peak_window=max((each.peak_window for each in found), default=0),
        )

    def _simulated(self) -> RecordCounters | None:
        if any(buffer.tier != "simulated" for buffer in self.buffers):
            return None
        labels = {buffer.label for buffer in self.buffers}
        found = [count for count in counters.snapshot() if count.tensor in labels]
        return RecordCounters(
            local_bytes=sum(count.bytes.local for count in found),
            remote_bytes=sum(count.bytes.remote for count in found),
            calls=sum(count.calls for count in found),
        )


def count_runs(
    run: Callable[[], object], buffers: Sequence[TieredBuffer], calls: int = 1
) -> RecordCounters:
    """What `calls` calls of `run` on the GPU count for the buffers. Waits for the device."""

    def every() -> None:
        for _ in range(calls):
            run()

    _, reads = count_run(every, buffers, torch.device("cuda", torch.cuda.current_device()))
    assert reads is not None, "a buffer has no counter"
    return reads


def count_run(
    run: Callable[[], Result], buffers: Sequence[TieredBuffer], device: torch.device
) -> tuple[Result, RecordCounters | None]:
    """What one call of `run` returns, and what it counts for the buffers; None where one of them
    has no counter. Waits for the device before and after."""
    counter = ReadCounter(buffers)
    synchronize(device)
    counter.reset()
    result = run()
    synchronize(device)
    return result, counter.read()
