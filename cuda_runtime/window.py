"""The window of each link: bytes that kernels may have requested from a remote tier and not got.

One word of device memory for each pair of GPU and remote tier. Kernels read it when they start, so
that a new value holds for captured CUDA graphs too.
"""

from __future__ import annotations

import struct
import threading

import torch

from dak_inductor import hardware
from dak_inductor.cuda_runtime.nvrtc import extension
from dak_inductor.errors import OptionError

_lock = threading.Lock()
_windows: dict[tuple[int, str], Window] = {}


class Window:
    """The window of one link, in bytes. `address` is that of the word in device memory."""

    def __init__(self, device: torch.device, tier: str) -> None:
        self.link = hardware.current(device).link(tier)
        self._word = extension().RecordChunk(device.index or 0, 4)
        self.address = int(self._word.address)
        self.set(default_window(self.link))

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def set(self, nbytes: int) -> None:
        """Bytes in flight from the next launch on. Raises OptionError below 1."""
        if not 0 < nbytes < 2**31:
            raise OptionError(f"a window of {nbytes} bytes; from 1 to {2**31 - 1} are possible")
        self._nbytes = nbytes
        self._word.write(struct.pack("<I", nbytes), 0)


def default_window(link: hardware.LinkProfile) -> int:
    """Twice what the link needs, and well below the knee where HBM reads suffer."""
    return min(link.window_knee * 3 // 4, link.window_floor * 2)


def window_of(device: torch.device, tier: str) -> Window:
    """The window between that GPU and `tier` ("cpu", "cuda:N"); made at the first call."""
    key = (device.index or 0, tier)
    found = _windows.get(key)
    if found is None:
        with _lock:
            found = _windows.get(key) or _windows.setdefault(key, Window(device, tier))
    return found
