"""Counting on the device what stock kernels and copies in captured graphs read of tiered buffers.

A kernel counts for up to 64 reads, from a table that is filled while the capture goes on: one for
each read took 1.2 us and a gap of 4 before the next kernel, on an H200.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from dak_inductor.cuda_runtime.kept_memory import KeptMemory
from dak_inductor.cuda_runtime.kernel import LoadedKernel, load
from dak_inductor.cuda_runtime.nvrtc import KernelInstance, instance

COUNT_TABLE = instance("count_table")
KERNELS: tuple[KernelInstance, ...] = (COUNT_TABLE,)

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
        arguments = [struct.pack("<Q", table.address)]
        kernel = load_counter(self._device_index)
        kernel.launch(grid=(1, 1, 1), block=(_TABLE_READS, 1, 1), arguments=arguments)
        return table


@lru_cache(maxsize=64)
def _captured_counts(device_index: int) -> _CapturedCounts:
    return _CapturedCounts(device_index)


def queue_count(
    record: int, reads: Sequence[tuple[int, int]], *, capture: int, device_index: int
) -> None:
    """Add, in each replay, one call that reads these (start, size) bytes of a buffer to its record.

    Args:
        record: device address of the buffer's record (`device_records`).
        capture: the number of that on torch's current stream.

    A replay counts by the split of its moment. Raises CompilationError, DeviceMemoryError,
    DriverError.
    """
    _captured_counts(device_index).add(capture, _entries(record, reads))


@lru_cache(maxsize=64)
def load_counter(device_index: int) -> LoadedKernel:
    """The kernel that counts: to be loaded before a capture needs it."""
    return load(COUNT_TABLE, device_index)


def _entries(record: int, reads: Sequence[tuple[int, int]]) -> list[bytes]:
    """For a table: the first of them counts the call."""
    return [
        _ENTRY.pack(record, start, size, int(position == 0))
        for position, (start, size) in enumerate(reads)
    ]
