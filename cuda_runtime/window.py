"""The window of each link: bytes that kernels may have requested from a remote tier and not got.

One record of device memory for each pair of GPU and remote tier, laid out as
kernels/window/record.cuh has it. Kernels read it when they start, so that a new value holds for
captured CUDA graphs too. The host fixes the window, or leaves it to the kernels: then they change
it by the delays that they see (kernels/window/law.cuh).
"""

from __future__ import annotations

import struct
import threading
from typing import Literal

import torch

from dak_inductor import hardware
from dak_inductor.cuda_runtime.launch_words import MOST_LINKS
from dak_inductor.cuda_runtime.nvrtc import extension
from dak_inductor.cuda_runtime.window_history import (
    HISTORY_LENGTH,
    WindowHistory,
    read_changes,
)
from dak_inductor.errors import OptionError
from dak_inductor.hardware_profile import LinkProfile

AUTOMATIC_BY_DEFAULT = False
"""Whether kernels change a link's window where the user says nothing."""

_CONTROLLER_OFFSET, _HISTORY_OFFSET = 128, 256
_CHANGE_BYTES = 32
RECORD_BYTES = _HISTORY_OFFSET + HISTORY_LENGTH * _CHANGE_BYTES

_HOST = struct.Struct("<4I")  # window, automatic, floor, cap
_CONTROLLER = struct.Struct("<4I")  # next, lock, updates, changes
_TAGS = 16  # windows that kernels change are multiples of it

_GUESSED_FLOOR = 64 * 1024
_GUESSED_CAP = 4  # times the knee

_lock = threading.Lock()
_windows: dict[tuple[int, str], Window] = {}


class Window:
    """The window of one link, in bytes. `address` is that of its record in device memory.

    `number`: of the link among those of its GPU. `automatic`: whether kernels change the window.
    `most`: what it may become while a captured launch lives.
    """

    def __init__(self, device: torch.device, tier: str, number: int) -> None:
        profile = hardware.current(device)
        self.device, self.tier, self.number = device, tier, number
        self.link = profile.link(tier)
        self._usual_limits = default_limits(self.link, guessed=profile.is_guess)
        self.limits = self._usual_limits
        self._record = extension().RecordChunk(device.index or 0, RECORD_BYTES)
        self.address = int(self._record.address)
        self._fix(default_window(self.link))  # without a wait: nothing reads the record yet
        if AUTOMATIC_BY_DEFAULT:
            self.set_automatic()

    @property
    def nbytes(self) -> int:
        """The window of launches to come."""
        if not self.automatic:
            return self._nbytes
        return int(_CONTROLLER.unpack(self._controller())[0]) // _TAGS * _TAGS

    def set(self, nbytes: int | Literal["auto"]) -> None:
        """Bytes in flight from the next launch on, fixed; or "auto", from the window of now on.

        Waits for the work in flight where that changes anything. Raises OptionError below 1.
        """
        if nbytes == "auto":
            if not self.automatic:
                self.set_automatic(max(self._nbytes, _TAGS))
            return
        if not 0 < nbytes < 2**31:
            raise OptionError(f"a window of {nbytes} bytes; from 1 to {2**31 - 1} are possible")
        if not self.automatic and nbytes == self._nbytes:
            return
        self._wait()
        self._fix(nbytes)

    def set_automatic(
        self, start: int | None = None, *, limits: tuple[int, int] | None = None
    ) -> None:
        """Leave the window to the kernels, from `start` bytes on and within `limits` (floor, cap),
        those of the profile where none are given.

        What was known of the link is forgotten. Waits for the work in flight. The next launch of a
        stream runs under the window that the one before left, if kernels changed it before, and
        those after it under `start`. Raises OptionError.
        """
        floor, cap = limits or self._usual_limits
        start = default_window(self.link) if start is None else start
        if not _TAGS <= floor <= cap < 2**31 or not _TAGS <= start < 2**31:
            raise OptionError(
                f"a window from {start} bytes on, between {floor} and {cap}: the limits must be in "
                f"order, and all three from {_TAGS} to {2**31 - 1} bytes"
            )
        start = start // _TAGS * _TAGS
        self._wait()
        self.limits = floor, cap
        self.automatic, self.most, self._nbytes = True, max(start, cap), start
        state = _CONTROLLER.pack(start, 0, 0, 0).ljust(_HISTORY_OFFSET - _CONTROLLER_OFFSET, b"\0")
        self._record.write(_HOST.pack(start, 1, floor, cap), 0)
        self._record.write(state, _CONTROLLER_OFFSET)

    def history(self) -> WindowHistory:
        """What kernels have made of the window; waits for nothing."""
        _, _, updates, changes = _CONTROLLER.unpack(self._controller())
        raw = self._record.read(HISTORY_LENGTH * _CHANGE_BYTES, _HISTORY_OFFSET)
        clock = getattr(torch.cuda.get_device_properties(self.device), "clock_rate", 0) * 1e3
        return WindowHistory(
            device=str(self.device),
            tier=self.tier,
            automatic=self.automatic,
            nbytes=self.nbytes,
            updates=updates if self.automatic else 0,
            changes=read_changes(raw, changes, clock) if self.automatic else (),
        )

    def _fix(self, nbytes: int) -> None:
        # attributes and not properties: every launch asks for them
        self.automatic, self.most, self._nbytes = False, nbytes, nbytes
        self._record.write(_HOST.pack(nbytes, 0, *self.limits), 0)

    def _wait(self) -> None:
        """All CTAs of a launch must read the same words: none may be starting while they change."""
        if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize(self.device)

    def _controller(self) -> bytes:
        return bytes(self._record.read(_CONTROLLER.size, _CONTROLLER_OFFSET))


def default_window(link: LinkProfile) -> int:
    """Twice what the link needs, and well below the knee where HBM reads suffer."""
    return min(link.window_knee * 3 // 4, link.window_floor * 2)


def default_limits(link: LinkProfile, *, guessed: bool) -> tuple[int, int]:
    """Floor and cap of a window that kernels change: the profile's, or wide ones around a guess."""
    floor, cap = link.window_floor, max(link.window_floor, link.window_knee)
    if guessed:
        floor, cap = min(floor, _GUESSED_FLOOR), _GUESSED_CAP * cap
    return max(_TAGS, floor), min(max(_TAGS, cap), 2**31 - 1)


def window_of(device: torch.device, tier: str) -> Window:
    """The window between that GPU and `tier` ("cpu", "cuda:N"); made at the first call."""
    key = (device.index or 0, tier)
    found = _windows.get(key)
    if found is None:
        with _lock:
            found = _windows.get(key)
            if found is None:
                number = sum(index == key[0] for index, _ in _windows)
                if number >= MOST_LINKS:
                    raise OptionError(
                        f"{device} has {number} links; {tier!r} would be one too many"
                    )
                found = _windows[key] = Window(device, tier, number)
    return found


def windows() -> tuple[Window, ...]:
    """Those of all links that were read through so far."""
    with _lock:
        return tuple(_windows.values())
