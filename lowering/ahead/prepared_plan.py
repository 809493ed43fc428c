"""What playing a plan takes of the host, worked out once for all plays of it.

Addresses and numbers, and marks of queues that are set anew at each play: an event is created once.
A mark is waited for as it was last set, and a play sets each before it waits for it, so what an
earlier play queued, or captured, is not touched. Plays of one plan do not overlap: the launch lock
is held.

No tensor is kept, so no memory is kept alive: views are made of the operands of each call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.lowering.ahead.sequence import StepCall, StoredWeight
from dak_inductor.lowering.ahead.step_plan import StepPlan
from dak_inductor.lowering.ahead.timeline import LOCAL
from dak_inductor.lowering.element_types import ELEMENT_BYTES
from dak_inductor.lowering.linear.counted_reads import CountedRead, counted_reads
from dak_inductor.lowering.linear.launch import LinearLaunch
from dak_inductor.lowering.linear.problem import LinearProblem
from dak_inductor.lowering.linear.product import Product
from dak_inductor.lowering.linear.ways import ways_of
from dak_inductor.lowering.marks import text_of


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes that the link brings for a part: from an address to `target`, from the ring's start.

    after: as of a `Place`. mark: whose bytes, on a profiler's timeline.
    """

    target: int
    source: int
    nbytes: int
    after: int
    mark: str


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows [start, stop) of one weight, multiplied in place or, for `part`, from the ring.

    at: their first element in the ring. few: so many are copied there just before.
    """

    part: int
    weight: int
    start: int
    stop: int
    at: int = 0
    few: int = 0


class PreparedPlan:
    """`orders` are by product: all rows in place as one, then each part, as the plan orders them.

    `awaited` are the parts whose reading a copy waits for, `copied` and `read` marks of queues by
    part, `names` those of products on a profiler's timeline.
    """

    def __init__(self, plan: StepPlan, calls: Sequence[StepCall]) -> None:
        self.plan = plan
        self.copies = tuple(_copy(plan, calls, number) for number in range(len(plan.parts)))
        self.orders = tuple(_order(plan, calls, number) for number in range(len(plan.ops)))
        self.names = tuple(text_of("staged", _buffers(call.weights)) for call in calls)
        self.awaited = frozenset(place.after for place in plan.at)
        self.copied: list[Any] = [None] * len(plan.parts)
        self.read: list[Any] = [None] * len(plan.parts)
        self._counts: dict[int, tuple[CountedRead, ...]] = {}
        self._launches: dict[int, tuple[LinearProblem, LinearLaunch]] = {}

    def launch(self, number: int, product: Product) -> tuple[LinearProblem, LinearLaunch]:
        """What launches the product, as one with nothing remote. Calls with one key launch alike.

        Raises CompilationError, DriverError.
        """
        found = self._launches.get(number)
        if found is None or not found[1].holds:
            facts = product.facts()
            # behind copies nothing starts early
            local = replace(facts, remote_bytes=(0,) * len(facts.remote_bytes), in_graph=False)
            configuration = next(
                way.configuration for way in ways_of(local) if way.name == "direct"
            )
            assert configuration is not None
            found = facts.problem, product.launch(facts.problem, configuration)
            if product.may_launch_again:
                self._launches[number] = found
        return found

    def counted(self, number: int, product: Product) -> tuple[CountedRead, ...]:
        """What the product reads. Calls with one key read the same."""
        found = self._counts.get(number)
        if found is None:
            found = self._counts[number] = counted_reads(product.weights)
        return found


def _buffers(weights: Sequence[StoredWeight]) -> Iterator[TieredBuffer | None]:
    """Of each weight; None where it has none, or that is gone."""
    return (None if weight.buffer is None else weight.buffer() for weight in weights)


def _copy(plan: StepPlan, calls: Sequence[StepCall], number: int) -> Copy:
    part, place = plan.parts[number], plan.at[number]
    weight = calls[part.op].weights[part.weight]
    return Copy(
        place.offset + (part.remote - part.start) * part.row_bytes,
        weight.address + part.remote * part.row_bytes,
        part.copied,
        place.after,
        text_of("copy", _buffers((weight,))),
    )


def _order(plan: StepPlan, calls: Sequence[StepCall], number: int) -> tuple[tuple[Rows, ...], ...]:
    order = plan.ops[number].order
    first = {}
    for position in reversed(order):
        if position != LOCAL:
            first[plan.parts[position].weight] = plan.parts[position].start
    in_place = []
    for weight, stored in enumerate(calls[number].weights):
        stop = first.get(weight, stored.rows)
        if stop:
            in_place.append(Rows(LOCAL, weight, 0, stop))
    return tuple(
        tuple(in_place) if position == LOCAL else (_in_ring(plan, position),) for position in order
    )


def _in_ring(plan: StepPlan, number: int) -> Rows:
    part, place = plan.parts[number], plan.at[number]
    at = place.offset // ELEMENT_BYTES
    return Rows(number, part.weight, part.start, part.stop, at, part.remote - part.start)
