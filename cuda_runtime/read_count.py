"""Counting on the device what stock kernels and copies read of tiered buffers.

Outside of a capture each call has a small kernel of its own: 1.2 us and a gap of 4 before the next
kernel, on an H200. Within one a single kernel counts for up to 64 reads, from a table that is
filled while the capture goes on.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from dak_inductor.cuda_runtime.current_stream import current_stream
from dak_inductor.cuda_runtime.kept_memory import KeptMemory
from dak_inductor.cuda_runtime.kernel import LoadedKernel, load
from dak_inductor.cuda_runtime.nvrtc import KernelInstance, extension, instance

COUNT_READS = instance("count_reads")
COUNT_TABLE = instance("count_table")
KERNELS: tuple[KernelInstance, ...] = (COUNT_READS, COUNT_TABLE)

_READS = 4  # of a launch, as kernels/count_reads.cu has
_HEAD = struct.Struct("<QII")
_READ = struct.Struct("<QQ")

_TABLE_READS = 64  # as kernels/count_table.cu has
_ENTRY = struct.Struct("<4Q")
_TABLE_BYTES = _TABLE_READS * _ENTRY.size
_TABLES_IN_CHUNK = 128
_MOST_OPEN = 64
"""Captures whose tables are remembered; one that is forgotten while it is open begins another."""


class _Table:
    """The reads of one captured launch, in a piece of `KeptMemory`."""

    def __init__(self, chunk: Any, offset: int) -> None:
        self.address = int(chunk.address) + offset
        self._chunk, self._offset, self._entries = chunk, offset, 0

    @property
    def room(self) -> int:
        return _TABLE_READS - self._entries

    def add(self, entries: Sequence[bytes]) -> None:
        """At most as many as there is room for; done on return."""
        self._chunk.write(b"".join(entries), self._offset + self._entries * _ENTRY.size)
        self._entries += len(entries)


class _CapturedCounts:
    """The tables of the captures of one GPU. Any thread may call it."""

    def __init__(self, device_index: int) -> None:
        self._device_index = device_index
        self._lock = threading.Lock()
        self._open: dict[int, _Table] = {}  # by capture
        self._memory = KeptMemory(device_index, _TABLES_IN_CHUNK * _TABLE_BYTES)

    def add(self, capture: int, entries: Sequence[bytes]) -> None:
        """Count these in each replay. Raises DeviceMemoryError, DriverError."""
        with self._lock:
            while entries:
                table = self._open.get(capture)
                if table is None or not table.room:
                    table = self._begin()
                    self._open.pop(capture, None)
                    self._open[capture] = table
                    while len(self._open) > _MOST_OPEN:
                        del self._open[next(iter(self._open))]
                now, entries = entries[: table.room], entries[table.room :]
                table.add(now)

    def _begin(self) -> _Table:
        table = _Table(*self._memory.take(_TABLE_BYTES))
        kernel, _ = _kernels(self._device_index)
        arguments = [struct.pack("<Q", table.address)]
        kernel.launch(grid=(1, 1, 1), block=(_TABLE_READS, 1, 1), arguments=arguments)
        return table


@lru_cache(maxsize=64)
def _captured_counts(device_index: int) -> _CapturedCounts:
    return _CapturedCounts(device_index)


def queue_count(record: int, reads: Sequence[tuple[int, int]], *, device_index: int) -> None:
    """Add one call that reads these (start, size) bytes of a buffer to its record.

    Args:
        record: device address of the buffer's record (`device_records`).

    Queued on torch's current stream: each replay of a graph captured over it counts by the split of
    that moment. Raises CompilationError, DeviceMemoryError, DriverError.
    """
    capture = extension().capture_id(current_stream(device_index))
    if capture:
        entries = _entries(record, tuple(reads))
        _captured_counts(device_index).add(capture, entries)
        return
    _, kernel = _kernels(device_index)
    for first in range(0, len(reads), _READS):
        arguments = _packed(record, tuple(reads[first : first + _READS]), first == 0)
        kernel.launch(grid=(1, 1, 1), block=(32, 1, 1), arguments=[arguments])


@lru_cache(maxsize=64)
def _kernels(device_index: int) -> tuple[LoadedKernel, LoadedKernel]:
    """For tables, and for single calls. Both are loaded with the first call, since a model is
    called before it is captured."""
    return load(COUNT_TABLE, device_index), load(COUNT_READS, device_index)


def _entries(record: int, reads: tuple[tuple[int, int], ...]) -> list[bytes]:
    """For a table: the first of them counts the call."""
    return [
        _ENTRY.pack(record, start, size, int(position == 0))
        for position, (start, size) in enumerate(reads)
    ]


@lru_cache(maxsize=8192)
def _packed(record: int, reads: tuple[tuple[int, int], ...], first: bool) -> bytes:
    """Arguments of one launch: a model's products read the same bytes at each step."""
    padded = (*reads, *[(0, 0)] * (_READS - len(reads)))
    arguments = _HEAD.pack(record, len(reads), int(first))
    return arguments + b"".join(_READ.pack(start, size) for start, size in padded)
