"""What was chosen for each kind of call, by a measurement on the first one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch

log = logging.getLogger(__name__)

MOST_KINDS = 4096
LEAST_GAIN = 0.005
"""By how much the fastest must beat what is taken unmeasured. Repeats of one way differ by more,
but a choice between equals costs nothing, and doubt costs what it loses elsewhere: replayed on the
trials of `linear_peer.json`, products that must gain 3% are 1.5 to 2% slower than their best way.
"""

Kind = TypeVar("Kind", bound=Hashable)
Choice = TypeVar("Choice")


class Choices(Generic[Kind, Choice]):
    """The choices so far; none is None. Thread-safe; one that is made stays.

    Args:
        capturing: whether a CUDA graph is being captured on the current stream of a device, given
            by its index.
    """

    def __init__(self, *, capturing: Callable[[int], bool] | None = None) -> None:
        self._capturing = capturing or is_capturing
        self._lock = threading.Lock()
        self._made: dict[Kind, Choice] = {}
        self._running: set[Kind] = set()

    def of(self, kind: Kind) -> Choice | None:
        """What was chosen."""
        with self._lock:
            return self._made.get(kind)

    def make(
        self,
        kind: Kind,
        default: Choice,
        measure: Callable[[], Choice] | None,
        *,
        device_index: int,
    ) -> Choice:
        """The choice for a call, by `measure` if it is the first of its kind; None: `default`.

        `default` serves the call, and is not remembered, while a graph is being captured, while
        another call of the kind is measured, and once there are `MOST_KINDS`. It is remembered
        where the measurement lacks memory: the call itself may need less.
        """
        with self._lock:
            made = self._made.get(kind)
            if made is not None:
                return made
            if kind in self._running or len(self._made) >= MOST_KINDS:
                return default
            if measure is None:
                return self._made.setdefault(kind, default)
            if self._capturing(device_index):
                return default
            self._running.add(kind)
        try:
            try:
                made = measure()
            except torch.OutOfMemoryError:
                log.info("%s: not measured for want of memory; %s is taken", kind, default)
                made = default
            with self._lock:
                self._made[kind] = made
            return made
        finally:
            with self._lock:
                self._running.discard(kind)


def fastest(seconds: Sequence[float]) -> int:
    """The position of the least, or 0 where it gains too little on that."""
    best = min(range(len(seconds)), key=seconds.__getitem__)
    return best if seconds[best] <= (1 - LEAST_GAIN) * seconds[0] else 0


def is_capturing(device_index: int) -> bool:
    """Whether a CUDA graph is being captured on the device's current stream."""
    if not torch.cuda.is_available():
        return False
    with torch.cuda.device(device_index):
        return torch.cuda.is_current_stream_capturing()
