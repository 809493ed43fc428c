"""Device memory for the rings of a graph's steps: what they may take, and what they took."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes of device memory that a ring may take; `charged`: weights make room for them."""

    nbytes: int
    charged: bool = False


class RingRoom:
    """Used under the launch lock.

    Args:
        ask: what there is besides rings that steps had; never asked during a capture.
    """

    def __init__(self, ask: Callable[[], Room]) -> None:
        self._ask = ask
        self._asked: Room | None = None
        self._held: torch.Tensor | None = None
        self._grew = False
        self.largest = 0
        """Bytes of the largest ring that a step had, or may have in a capture."""
        self.least: int | None = None
        """Bytes that a ring could have whenever a step was planned. It only falls, so that what is
        placed by it does not move back and forth."""

    def to_plan(self, *, capturing: bool) -> Room | None:
        """For a step that is planned now; None in a capture before which none was."""
        if not capturing:
            self._asked = self._ask()
        if self._asked is None:
            return None
        room = self._with_own(self._asked)
        self.least = room.nbytes if self.least is None else min(room.nbytes, self.least)
        return room

    def to_predict(self) -> Room:
        """For a step that may never be planned so. Not to be called during a capture."""
        return self._with_own(self._asked or self._ask())

    def note(self, ring_bytes: int) -> None:
        """A step has a ring of so many bytes."""
        self._grew |= ring_bytes > self.largest
        self.largest = max(self.largest, ring_bytes)

    def grew(self) -> bool:
        """Whether one was noted that is larger than all before, since this was last asked."""
        grew, self._grew = self._grew, False
        return grew

    def hold(self, ring_bytes: int, device: torch.device) -> None:
        """Take the ring that captures will have until `release`, through a call that has none of
        its own: weights make room for the peak that torch's allocator reports of calls outside of
        captures."""
        if ring_bytes > self.largest:
            try:
                self._held = torch.empty(ring_bytes, dtype=torch.uint8, device=device)
            except torch.OutOfMemoryError:
                return
            self.note(ring_bytes)

    def release(self) -> None:
        """Give back what is held."""
        self._held = None

    def _with_own(self, room: Room) -> Room:
        return replace(room, nbytes=max(room.nbytes, self.largest))
