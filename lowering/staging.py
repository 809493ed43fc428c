"""The order of copies into the slots of a ring and of the work that reads them.

Kept by marks between two queues alone: nothing waits on the host, and under capture the side queue
forks from and joins the capturing one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, Protocol, TypeVar

from dak_inductor.lowering.linear.queues import Queue


class StagedPart(Protocol):
    """A part of the work; a staged one is copied into a slot first."""

    @property
    def staged(self) -> bool: ...


PartType = TypeVar("PartType", bound=StagedPart)
SlotType = TypeVar("SlotType")
_Part = TypeVar("_Part", contravariant=True)
_Slot = TypeVar("_Slot", contravariant=True)


class StagedWork(Protocol, Generic[_Part, _Slot]):
    """What is done for a part."""

    def stage(self, part: _Part, slot: _Slot) -> None:
        """Launch the copies of the part into the slot."""

    def compute(self, part: _Part, slot: _Slot | None) -> None:
        """Launch what reads the part: from its slot, or where it lies."""


def issue(
    parts: Sequence[PartType],
    work: StagedWork[PartType, SlotType],
    slots: Sequence[SlotType],
    main: Queue,
    side: Queue,
    count: Callable[[], object],
) -> None:
    """Queue copies on `side` and the work of all parts, in their order, on `main`.

    `count` is queued where it delays nothing: behind the last copy, if there is one. `main` ends
    behind all that was queued.
    """
    staged = [part for part in parts if part.staged]
    computed: list[object] = []
    copied: list[object] = []

    def fetch(position: int) -> None:
        if position >= len(slots):
            side.wait(computed[position - len(slots)])
        side.run(partial(work.stage, staged[position], slots[position % len(slots)]))
        copied.append(side.record())
        if len(copied) == len(staged):
            side.run(count)

    if staged:
        side.wait(main.record())  # earlier work on main may still use the slots' memory
    for position in range(min(len(slots), len(staged))):
        fetch(position)
    for part in parts:
        if not part.staged:
            main.run(partial(work.compute, part, None))
            continue
        position = len(computed)
        main.wait(copied[position])
        main.run(partial(work.compute, part, slots[position % len(slots)]))
        computed.append(main.record())
        if len(copied) < len(staged):
            fetch(len(copied))
    if not staged:
        main.run(count)
    else:
        main.wait(side.record())
