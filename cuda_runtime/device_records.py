"""What kernels know of a tiered buffer: its split, the counters they add to, and where it lies.

One record of 64 bytes in device memory per buffer, little endian. Its address stands in captured
graphs, so it never changes while the buffer lives, and a move writes the new split behind it:

    offset 0   u64  split         bytes [0, split) are local
    offset 8   u64  local_bytes   counters that kernels add to
    offset 16  u64  remote_bytes
    offset 24  u64  calls
    offset 32  u64  peak_window   bytes, a maximum
    offset 40  u64  address       of the buffer's byte 0
    offset 48  u64  window        address of the 32-bit word of the link (`window`)
    offset 56       zero

The memory comes from the driver, not from torch: no pool that is current when a buffer is made may
own it, and it is written while another thread captures a graph.

What no kernel of ours reads is counted beside it on the host, where it is queued, or by a table of
a captured graph (`read_count`).
"""

from __future__ import annotations

import struct
import threading
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dak_inductor.cuda_runtime.nvrtc import extension
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.cuda_runtime.window import window_of

RECORD_BYTES = 64
RECORDS_IN_CHUNK = 1024

_LAYOUT = struct.Struct("<7Q8x")
_PEAK_WINDOW_OFFSET = 32


@dataclass(frozen=True, slots=True)
class RecordCounters:
    """What was counted for one buffer: bytes read by tier, calls, largest window of a kernel."""

    local_bytes: int = 0
    remote_bytes: int = 0
    calls: int = 0
    peak_window: int = 0

    def __add__(self, other: RecordCounters) -> RecordCounters:
        return RecordCounters(
            self.local_bytes + other.local_bytes,
            self.remote_bytes + other.remote_bytes,
            self.calls + other.calls,
            max(self.peak_window, other.peak_window),
        )

    def since(self, base: RecordCounters) -> RecordCounters:
        """Sums less those of `base`; the peak as it is."""
        return RecordCounters(
            self.local_bytes - base.local_bytes,
            self.remote_bytes - base.remote_bytes,
            self.calls - base.calls,
            self.peak_window,
        )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a record lies: a chunk of device memory and the byte offset in it."""

    chunk: Any  # _driver.RecordChunk
    offset: int


class DeviceRecord:
    """The record of one buffer."""

    def __init__(self, place: _Place, buffer: TieredBuffer, window_address: int) -> None:
        self.address = int(place.chunk.address) + place.offset
        self.base = RecordCounters()  # counters at the last reset
        self._place = place
        self._lock = threading.Lock()
        self._by_host = [0, 0, 0]  # bytes local and remote, calls
        record = _LAYOUT.pack(buffer.split, 0, 0, 0, 0, buffer.address, window_address)
        place.chunk.write(record, place.offset)

    def publish(self, split: int) -> None:
        """Write the split, done on return. No kernel that reads the record may be in flight."""
        self._place.chunk.write(struct.pack("<Q", split), self._place.offset)

    def count_call(self, read: TierBytes) -> None:
        """Count a call that nothing on the device counts. Any thread."""
        with self._lock:
            self._by_host[0] += read.local
            self._by_host[1] += read.remote
            self._by_host[2] += 1

    def counters(self) -> RecordCounters:
        """All that finished kernels and the host have counted since the buffer was made."""
        record = _LAYOUT.unpack(self._place.chunk.read(RECORD_BYTES, self._place.offset))
        with self._lock:
            return RecordCounters(*record[1:5]) + RecordCounters(*self._by_host)

    def reset(self) -> None:
        """Sums restart from where they are, so that none of a kernel in flight is lost."""
        self.base = self.counters()
        self._place.chunk.write(struct.pack("<Q", 0), self._place.offset + _PEAK_WINDOW_OFFSET)


class DeviceRecords:
    """The records of one device. Any thread may call it; one at a time is let in."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lock = threading.Lock()
        self._records: weakref.WeakKeyDictionary[TieredBuffer, DeviceRecord] = (
            weakref.WeakKeyDictionary()
        )
        self._free: list[_Place] = []

    def record(self, buffer: TieredBuffer) -> int:
        """Device address of the buffer's record, made with its current split where it has none.

        Raises DeviceMemoryError where a new chunk of records does not fit, ProfileError where the
        hardware profile has no such link. Not during a capture of the calling thread.
        """
        with self._lock:
            record = self._records.get(buffer)
            if record is None:
                window = window_of(self.device, buffer.tier)
                place = self._take()
                record = self._records[buffer] = DeviceRecord(place, buffer, window.address)
                buffer.record = record
                last_use = weakref.finalize(buffer, _recycle, self._free, place, self._index)
                last_use.atexit = False
            return record.address

    def publish(self, buffer: TieredBuffer) -> None:
        """Write the current split of a buffer that has a record, done on return.

        Assigning `buffer.split` does it. No kernel that reads the record may be in flight.
        """
        with self._lock:
            record = self._records.get(buffer)
        if record is not None:
            record.publish(buffer.split)

    def read_counters(self) -> dict[TieredBuffer, RecordCounters]:
        """What was counted since the last reset, by live buffer; of kernels, those that ended.

        Waits for nothing: synchronise the device first to have all that was launched.
        """
        return {buffer: r.counters().since(r.base) for buffer, r in self._live()}

    def reset_counters(self) -> None:
        """Start all counters anew."""
        for _, record in self._live():
            record.reset()

    def _live(self) -> list[tuple[TieredBuffer, DeviceRecord]]:
        with self._lock:
            return list(self._records.items())

    @property
    def _index(self) -> int:
        return self.device.index or 0

    def _take(self) -> _Place:
        if not self._free:
            chunk = extension().RecordChunk(self._index, RECORDS_IN_CHUNK * RECORD_BYTES)
            offsets = range((RECORDS_IN_CHUNK - 1) * RECORD_BYTES, -1, -RECORD_BYTES)
            self._free += [_Place(chunk, offset) for offset in offsets]
        return self._free.pop()


_by_device: dict[int, DeviceRecords] = {}
_by_device_lock = threading.Lock()


def records_of(device: torch.device) -> DeviceRecords:
    """The records of a CUDA device in this process."""
    index = device.index or 0
    with _by_device_lock:
        if index not in _by_device:
            _by_device[index] = DeviceRecords(torch.device("cuda", index))
        return _by_device[index]


def attach(buffer: TieredBuffer) -> None:
    """Give a buffer on a CUDA device its record; nothing for one that only the CPU reads."""
    if buffer.device.type == "cuda":
        records_of(buffer.device).record(buffer)


def _recycle(free: list[_Place], place: _Place, device: int) -> None:
    """A kernel in flight may still add to the record of a buffer that has died."""
    extension().run_after_work(device, partial(free.append, place))
