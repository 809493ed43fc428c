"""When a step's copies arrive and its products end, if some products are staged.

Two resources: the main queue does the products in order, the link copies parts in order, each as
soon as its place in the ring is free. A product that reads the link itself shares it with the
copies: it takes as much longer as they keep the link busy, at most twice, and the copies that are
not under way yet are that much later. What lies between products is work of the main queue.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from dak_inductor.lowering.ahead.ring_places import Place
from dak_inductor.lowering.ahead.step_op import LinkRates, StepOp
from dak_inductor.lowering.copy_cost import CROSSING_SECONDS, FORK_SECONDS, JOIN_SECONDS

LOCAL = -1
"""In the order of a product: the rows in place. All other numbers are parts."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows [start, stop) of one weight of one product; rows [remote, stop) come by the link."""

    op: int
    weight: int
    start: int
    stop: int
    remote: int
    row_bytes: int

    @property
    def size(self) -> int:
        """Bytes in the ring."""
        return (self.stop - self.start) * self.row_bytes

    @property
    def copied(self) -> int:
        """Bytes that the link copies."""
        return (self.stop - self.remote) * self.row_bytes


@dataclass(frozen=True, slots=True)
class Timeline:
    """Seconds of the step up to its last product, those without what products wait for, and by
    staged product the order of its parts and its rows in place."""

    seconds: float
    work: float
    orders: dict[int, tuple[int, ...]]


def simulate(
    ops: Sequence[StepOp],
    parts: Sequence[Part],
    at: Sequence[Place],
    rates: LinkRates,
    launched: Collection[int] = (),
) -> Timeline:
    """The step with these parts staged, each at its place; products without parts run as they are.

    A product first does the parts that are there, which makes room in the ring, then its rows in
    place, then the other parts. Those of `launched` are one launch behind all of their parts.
    """
    of_op: dict[int, list[int]] = {}
    for number, part in enumerate(parts):
        of_op.setdefault(part.op, []).append(number)
    link = _Link(parts, at, rates)
    now = work = 0.0
    orders: dict[int, tuple[int, ...]] = {}
    for number, op in enumerate(ops):
        link.advance()
        now += op.before
        work += op.before
        mine = of_op.get(number)
        if mine is None:
            now += link.shared(now, op)
            work += op.direct
            continue
        if number in launched:
            now = max(now, *(link.arrived[each] for each in mine)) + op.launch * rates.slowdown
            work += op.launch
            link.read += [now] * len(mine)
            orders[number] = tuple(mine)
            continue
        order: list[int] = []
        work += op.local + op.rest
        waiting = any(span.start for span in op.weights)
        for each in mine:
            link.advance()
            arrived = link.arrived[each]
            if waiting and now < arrived:
                order.append(LOCAL)
                now += op.local * rates.slowdown
                waiting = False
            order.append(each)
            part = parts[each]
            rows = part.stop - part.start
            whole = rows == op.weights[part.weight].rows
            own = op.part + rows * (op.row if whole else op.row + op.piece_row)
            now = max(now, arrived) + own * rates.slowdown
            work += own
            link.read.append(now)
        if waiting:
            order.append(LOCAL)
            now += op.local * rates.slowdown
        now += op.rest
        orders[number] = tuple(order)
    return Timeline(max(now + (JOIN_SECONDS if parts else 0.0), link.work), work, orders)


class _Link:
    """The copies so far: `arrived` by part, `read` what the main queue is done with, and the
    `work` of the link, other reads included."""

    def __init__(self, parts: Sequence[Part], at: Sequence[Place], rates: LinkRates) -> None:
        self._seconds = [rates.copy_seconds(part.copied) for part in parts]
        self._after = [place.after for place in at]
        self._slowdown = rates.slowdown
        self._free = FORK_SECONDS
        self.arrived: list[float] = []
        self.read: list[float] = []
        self.work = sum(self._seconds)

    def advance(self) -> None:
        """Queue the copies whose places have been read."""
        while len(self.arrived) < len(self._after):
            after = self._after[len(self.arrived)]
            if after >= len(self.read):
                return
            if after >= 0:
                self._free = max(self._free, self.read[after] + CROSSING_SECONDS)
            self._free += self._seconds[len(self.arrived)]
            self.arrived.append(self._free + CROSSING_SECONDS)

    def shared(self, now: float, op: StepOp) -> float:
        """How long a product takes that reads the link itself."""
        busy = min(max(self._free - now, 0.0), op.link)
        self._free += op.link
        self.work += op.link
        return max(op.direct * (self._slowdown if busy else 1.0), op.link + busy)
