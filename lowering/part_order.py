"""The order of parts copied to slots of a ring and of parts in place, and how long it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from dak_inductor.lowering.copy_cost import CROSSING_SECONDS, FORK_SECONDS

PartType = TypeVar("PartType")


@dataclass(frozen=True, slots=True)
class PartOrder(Generic[PartType]):
    """Parts in the order of their work, which ends after `seconds`.

    copy_bound: the last staged part waits for its copy.
    """

    parts: tuple[PartType, ...]
    seconds: float
    copy_bound: bool


def order_parts(
    local: Sequence[PartType],
    staged: Sequence[PartType],
    slots: int,
    *,
    copy: Callable[[PartType], float],
    compute: Callable[[PartType], float],
) -> PartOrder[PartType]:
    """A staged part as soon as it is there, else a local one; the work of all one after the other.

    `copy` and `compute` give the seconds of a part. Staged part i takes slot i % slots once the
    work on what lay there is done.
    """
    now, arrived = 0.0, FORK_SECONDS
    order: list[PartType] = []
    done: list[float] = []
    waiting = list(reversed(local))
    copy_bound = False
    for position, part in enumerate(staged):
        if position >= slots:
            arrived = max(arrived, done[position - slots] + CROSSING_SECONDS)
        arrived += copy(part)
        ready = arrived + CROSSING_SECONDS
        while waiting and now < ready:
            order.append(waiting.pop())
            now += compute(order[-1])
        order.append(part)
        copy_bound = now < ready
        now = max(now, ready) + compute(part)
        done.append(now)
    now += sum(compute(part) for part in waiting)
    return PartOrder((*order, *reversed(waiting)), now, copy_bound)
