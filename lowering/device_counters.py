"""What kernels counted in device memory, by tiered buffer."""

from __future__ import annotations

import torch

from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.device_records import RecordCounters, records_of
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer


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


def _devices() -> list[torch.device]:
    """The devices on which a live buffer has a record."""
    devices = {b.device for b in address_table.live_buffers() if b.device_record and b.usable}
    return sorted(devices, key=str)
