"""What was counted in the records of tiered buffers, by kernels and by the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

import dak_inductor.lowering.residency  # noqa: F401  (registers torch.ops.dak.residency)
from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.device_records import RecordCounters, records_of
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.lowering import reads

_COUNTERS = slice(1, 5)  # words of a record (`dak_inductor.lowering.residency`)


def read() -> list[tuple[TieredBuffer, RecordCounters]]:
    """The counters of the live buffers that were read since the last reset.

    Waits for the work in flight, except while a CUDA graph is being captured: what the caller
    captures has not run yet, and waiting would end the capture.
    """
    found: list[tuple[TieredBuffer, RecordCounters]] = []
    for device in _devices():
        if not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize(device)
        found += records_of(device).read_counters().items()
    return [(buffer, counted) for buffer, counted in found if counted.calls]


def reset() -> None:
    """Start the counters of all live buffers anew."""
    for device in _devices():
        records_of(device).reset_counters()


@contextmanager
def kept(operands: Sequence[torch.Tensor]) -> Iterator[None]:
    """What is queued inside, on the current stream, leaves the counters of the operands' buffers as
    they were, and nothing counts for stock operators. What another stream counts meanwhile is
    lost."""
    records: list[torch.Tensor] = [torch.ops.dak.residency.default(each) for each in operands]
    counters = [record[_COUNTERS] for record in records]
    before = [each.clone() for each in counters]
    try:
        with reads.uncounted():
            yield
    finally:
        for each, saved in zip(counters, before, strict=True):
            each.copy_(saved)


def _devices() -> list[torch.device]:
    """The devices on which a live buffer has a record."""
    devices = {b.device for b in address_table.live_buffers() if b.device_record and b.usable}
    return sorted(devices, key=str)
