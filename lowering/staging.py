"""The order of copies into the slots of a ring and of the work that reads them.

Kept by marks between two queues alone: nothing waits on the host, and under capture the side queue
forks from and joins the capturing one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, Protocol, TypeVar

from dak_inductor.lowering.queues import Queues


class StagedPart(Protocol):
    """A part of the work; a staged one is copied into a slot first."""

    @property
    def staged(self) -> bool: ...


PartType = TypeVar("PartType", bound=StagedPart)
SlotType = TypeVar("SlotType")
_Part = TypeVar("_Part", contravariant=True)
_Slot = TypeVar("_Slot", contravariant=True)

_AHEAD = 2  # copies that are queued before work that does not need them yet


class StagedWork(Protocol, Generic[_Part, _Slot]):
    """What is done for a part."""

    def stage(self, part: _Part, slot: _Slot, stream: int) -> None:
        """Launch the copies of the part into the slot, on that CUstream."""

    def compute(self, part: _Part, slot: _Slot | None) -> None:
        """Launch what reads the part: from its slot, or where it lies."""


def issue(
    parts: Sequence[PartType],
    work: StagedWork[PartType, SlotType],
    slots: Sequence[SlotType],
    queues: Queues,
    count: Callable[[], object],
    *,
    copy_bound: bool,
) -> None:
    """Queue the copies on a queue of their own, the work of all parts, in their order, on the main.

    The first copy comes first, then the first work, since the host takes as long to queue some
    copies as the device may take for one; then copies keep a little ahead of the work.

    The main queue ends behind all that was queued. `count` is queued where it delays nothing: where
    the last staged work waits for its copy (`copy_bound`) ahead of all work, and no second join is
    needed; else behind the last copy. Never ahead of a copy, since it may have to wait until a GEMM
    that holds every SM has ended.
    """
    main, side = queues.main, queues.copies
    staged = [part for part in parts if part.staged]
    computed: list[object] = []
    copied: list[object] = []

    def fetch(ahead: int) -> None:
        while len(copied) < min(ahead, len(computed) + len(slots), len(staged)):
            position = len(copied)
            if position >= len(slots):
                side.wait(computed[position - len(slots)])
            side.launch(partial(work.stage, staged[position], slots[position % len(slots)]))
            copied.append(side.record())

    if staged:
        side.wait(main.record())  # earlier work on main may still use the slots' memory
        fetch(1)
    if copy_bound or not staged:
        main.run(count)
    for queued, part in enumerate(parts, 1):
        if part.staged:
            position = len(computed)
            main.wait(copied[position])
            main.run(partial(work.compute, part, slots[position % len(slots)]))
            computed.append(main.record())
        else:
            main.run(partial(work.compute, part, None))
        fetch(queued + _AHEAD)
    if staged and not copy_bound:
        side.run(count)
        main.wait(side.record())
