"""Places in a ring of bytes for parts that are copied and read in one order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
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


def places(groups: Iterable[Sequence[int]], ring_bytes: int) -> list[Place]:
    """Where each part goes, by groups of sizes: parts of one group are read at once.

    Parts are read in their order, so what lay in a place is gone once the last part that it
    overlaps has been read; `after` never falls, and is never a part of the own group.

    The `side_by_side` of each group is at most `ring_bytes`.
    """
    found: list[Place] = []
    held: deque[tuple[int, int, int]] = deque()  # start, end, part: those not overwritten yet
    head, after = 0, -1
    for group in groups:
        if head + side_by_side(group) > ring_bytes:
            head = 0
        start, first = head, len(found)
        for size in group:
            end = head + size
            for begin, stop, earlier in held:
                if begin < end and head < stop:
                    after = max(after, earlier)
            found.append(Place(head, size, after))
            head = _aligned(end)
        while held and held[0][2] <= after:
            held.popleft()
        if group:
            held.append((start, head, first + len(group) - 1))
    return found


def side_by_side(sizes: Iterable[int]) -> int:
    """Bytes of a ring that holds parts of these sizes at once."""
    return sum(map(_aligned, sizes))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
