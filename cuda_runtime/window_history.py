"""What kernels made of a link's window: the changes that they record in device memory."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

HISTORY_LENGTH = 256
"""Changes that are kept (kernels/window/record.cuh)."""

Cause = Literal["start", "dip", "law", "hold"]
_CAUSES: tuple[Cause, ...] = ("start", "dip", "law", "hold")
_CHANGE = struct.Struct("<QIIfIII")
MICROSECOND = 1e-6
_FULL = 3.2
"""Times the least delay: below, the law takes the link for one with room, and windows grow
(kernels/window/law.cuh, target / hysteresis)."""


@dataclass(frozen=True, slots=True)
class WindowChange:
    """An update after which the window, or the least delay known, was another.

    `seconds` is the GPU's clock, `update` counts from 1. `nbytes` is the window from then on;
    before it copies took `delay` seconds in the mean, with at most `in_flight` bytes requested, and
    a copy on an idle link takes `least_delay`. A "dip" is a small window for a few launches, to
    find that out; a "hold" left the window as it was. Delays are nan where the GPU's clock rate is
    not known.
    """

    update: int
    seconds: float
    nbytes: int
    delay: float
    least_delay: float
    in_flight: int
    cause: Cause

    def __str__(self) -> str:
        return (
            f"{self.cause} at update {self.update}: {self.nbytes} bytes; delays were "
            f"{self.delay / MICROSECOND:.1f} us, at least {self.least_delay / MICROSECOND:.1f}"
        )


@dataclass(frozen=True, slots=True)
class WindowHistory:
    """The window of a link now, and its last changes, oldest first; empty for a fixed window."""

    device: str
    tier: str
    automatic: bool
    nbytes: int
    updates: int
    changes: tuple[WindowChange, ...]

    @property
    def bandwidth(self) -> float | None:
        """Bytes/s that the link brought before the last change with a full link; None: not seen."""
        for change in reversed(self.changes):
            if change.cause != "dip" and change.delay > _FULL * change.least_delay:
                return change.in_flight / change.delay
        return None

    def __str__(self) -> str:
        now = f"window of the link from {self.device} to {self.tier}: {self.nbytes} bytes"
        if not self.automatic:
            return f"{now}, fixed"
        last = f"; {self.changes[-1]}" if self.changes else ""
        return f"{now}, automatic, {self.updates} updates{last}"


def update_entry(seconds: float, nbytes: int, delay: float) -> dict[str, float]:
    """A change as a record's `window_history` has it (dak_inductor/report/window_history.py)."""
    return {
        "nanoseconds": round(seconds * 1e9),
        "window": nbytes,
        "delay_nanoseconds": delay * 1e9,
    }


def read_changes(raw: bytes, count: int, cycles_per_second: float) -> tuple[WindowChange, ...]:
    """The last of `count` changes, from the ring as kernels write it."""
    kept = min(count, HISTORY_LENGTH)
    found = []
    for index in range(count - kept, count):
        place = index % HISTORY_LENGTH * _CHANGE.size
        time, number, nbytes, delay, least, in_flight, cause = _CHANGE.unpack_from(raw, place)
        scale = 1 / cycles_per_second if cycles_per_second else float("nan")
        found.append(
            WindowChange(
                update=number,
                seconds=time * 1e-9,
                nbytes=nbytes,
                delay=delay * scale,
                least_delay=least * scale,
                in_flight=in_flight,
                cause=_CAUSES[min(cause, len(_CAUSES) - 1)],
            )
        )
    return tuple(found)
