"""Zeroed device memory that is handed out once and never taken back."""

from __future__ import annotations

from typing import Any

from dak_inductor.cuda_runtime.nvrtc import extension


class KeptMemory:
    """Cuts what it hands out from chunks. A captured graph may hold any of it, and no one learns
    when the last such graph is gone: so the chunks live as long as the process.

    Not thread-safe: its user holds a lock.
    """

    def __init__(self, device_index: int, chunk_bytes: int) -> None:
        self._device_index, self._chunk_bytes = device_index, chunk_bytes
        self._chunks: list[Any] = []
        self._used = 0

    def take(self, nbytes: int) -> tuple[Any, int]:
        """A chunk, and the offset in bytes at which `nbytes` of it are the caller's.

        Raises DeviceMemoryError.
        """
        if not self._chunks or self._used + nbytes > self._chunks[-1].nbytes:
            chunk = extension().RecordChunk(self._device_index, max(nbytes, self._chunk_bytes))
            self._chunks.append(chunk)
            self._used = 0
        offset, self._used = self._used, self._used + nbytes
        return self._chunks[-1], offset
