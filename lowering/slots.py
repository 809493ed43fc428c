"""Slots of a ring in device memory: how many, and how large each, for parts of known sizes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

MOST_SLOTS = 16
_ALIGNMENT = 128  # elements: a slot starts where a tensor of its own would


def slot_sizes(parts: Sequence[int], room: int) -> tuple[int, ...]:
    """Sizes of the slots that the parts go through in turn: part i through slot i % slots.

    As many as `room` holds, since a slot is free again only behind all work that was queued before
    its part's: three slots of 4 MB held copies up for 0.9 ms behind a product of 1.1 ms (H200). One
    where `room` does not hold two.
    """
    for count in range(min(len(parts), MOST_SLOTS), 1, -1):
        sizes = tuple(max(parts[slot::count]) for slot in range(count))
        if sum(sizes) <= room:
            return sizes
    return (max(parts),) if parts else ()


def allocate(elements: Sequence[int], like: Tensor) -> tuple[Tensor, ...]:
    """Flat tensors of so many elements in one allocation, of the dtype and device of `like`."""
    if len(elements) < 2:
        return tuple([like.new_empty(size) for size in elements])
    steps = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in elements]
    memory = like.new_empty(sum(steps))
    parts = memory.split(steps)
    return tuple(part[:size] for part, size in zip(parts, elements, strict=True))
