"""Places in a ring of bytes for parts that are copied and read in one order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

ALIGNMENT = 256
"""Bytes: a part starts where a tensor of its own would."""


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes [offset, offset + size) of the ring, free once part `after` has been read; -1: from the
    start of the step."""

    offset: int
    size: int
    after: int


def places(sizes: Iterable[int], ring_bytes: int) -> list[Place]:
    """Where each part goes. Parts are read in their order, so what lay in a place is gone once the
    last part that it overlaps has been read; `after` never falls.

    Each size is at most `ring_bytes`.
    """
    found: list[Place] = []
    held: deque[tuple[int, int, int]] = deque()  # start, end, part: those not overwritten yet
    head, after = 0, -1
    for part, size in enumerate(sizes):
        if head + size > ring_bytes:
            head = 0
        end = head + size
        for start, stop, earlier in held:
            if start < end and head < stop:
                after = earlier
        while held and held[0][2] <= after:
            held.popleft()
        found.append(Place(head, size, after))
        held.append((head, end, part))
        head = -(-end // ALIGNMENT) * ALIGNMENT
    return found


def ring_bytes_for(sizes: Iterable[int], most: int) -> int:
    """Bytes of a ring for parts of these sizes: all side by side where `most` holds them."""
    return min(most, sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes))
