"""Plans of a step with some of its products staged: which ones, through rings of which sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from dak_inductor import copy_ring
from dak_inductor.copy_ring import LAUNCHES_IN_RING, PARTS_IN_RING
from dak_inductor.lowering.ahead.ring_places import places, side_by_side
from dak_inductor.lowering.ahead.step_op import LinkRates, RowSpan, StepOp
from dak_inductor.lowering.ahead.step_plan import OpStep, StepPlan
from dak_inductor.lowering.ahead.timeline import Part, simulate
from dak_inductor.options import Strategy

EVEN = 0.002
"""Of the time: so little is not worth a larger ring."""
LEAST_REMOTE_BYTES = 128 * 2**10
"""Of a product that `auto` may stage: less is read directly while a copy would start."""

_ROWS = 8
_STAGED = "its remote rows are copied ahead"
_FEW_BYTES = 2 * 2**20
"""Of products that `auto` also tries to leave direct: what an own copy costs is what it saves."""


class Ring(NamedTuple):
    """To try: so many bytes. A product is one launch where they hold its rows `launches` times."""

    nbytes: int
    launches: int = LAUNCHES_IN_RING


def staged_plans(
    ops: Sequence[StepOp],
    rates: LinkRates,
    strategy: Strategy,
    most: int,
    price: Callable[[StepPlan], float],
) -> list[StepPlan]:
    """All products that may be chosen through the largest ring, the best choice through smaller
    ones as long as they are as good."""
    found: list[StepPlan] = []
    best: tuple[float, tuple[int, ...], str] | None = None
    for chosen, reason in _candidates(ops, strategy):
        for ring in _rings(most, [ops[number] for number in chosen]):
            plans = _plans(ops, chosen, reason, rates, ring)
            found += plans
            for plan in plans:
                if best is None or price(plan) < best[0]:
                    best = price(plan), chosen, reason
    while best is not None and (most := most // 2) >= copy_ring.LEAST_RING_BYTES:
        plans = _plans(ops, *best[1:], rates, Ring(most))
        seconds = min(map(price, plans), default=math.inf)
        if seconds > (1 + EVEN) * best[0]:
            break
        found += plans
        best = min(seconds, best[0]), *best[1:]
    return found


def _plans(
    ops: Sequence[StepOp], chosen: tuple[int, ...], reason: str, rates: LinkRates, ring: Ring
) -> list[StepPlan]:
    """With the last product as one launch, if it may be one, and in parts. So it may read its local
    rows while the link still copies, and what shows behind the last copy is a part."""
    last = chosen[-1:] if _may_launch(ops[chosen[-1]], ring) else ()
    plans = [_planned(ops, chosen, reason, rates, ring, p) for p in dict.fromkeys(((), last))]
    return [plan for plan in plans if plan is not None]


def _rings(most: int, staged: Sequence[StepOp]) -> Iterator[Ring]:
    """The largest, and what the largest product needs that is one launch: twice its rows, or once
    where the link has time to wait until they were read."""
    yield Ring(most)
    for launches in (LAUNCHES_IN_RING, 1):
        rows = [_ring_bytes(op) for op in staged if _may_launch(op, Ring(most, launches))]
        enough = max(copy_ring.LEAST_RING_BYTES, launches * max(rows, default=most))
        if enough < most:
            yield Ring(enough, launches)


def _may_launch(op: StepOp, ring: Ring) -> bool:
    """Whether one launch reads it through this ring: both of its weights in the ring from the same
    row on, where both are."""
    starts = {span.start for span in op.weights if span.start < span.rows}
    fits = ring.launches * _ring_bytes(op) <= ring.nbytes
    return op.launch > 0 and len(starts) == 1 and fits


def _ring_bytes(op: StepOp) -> int:
    """Of all of its parts."""
    return side_by_side((span.rows - span.start) * span.row_bytes for span in op.weights)


def _candidates(ops: Sequence[StepOp], strategy: Strategy) -> Iterator[tuple[tuple[int, ...], str]]:
    """Which products to stage, and why the others are not; each choice once. None but those that
    read the link themselves are left out."""
    able = [number for number, op in enumerate(ops) if op.remote_bytes > 0]
    if strategy == "staged":
        if able:
            yield tuple(able), "nothing of it is remote"
        return

    def those(fit: Callable[[StepOp], bool]) -> tuple[int, ...]:
        return tuple(n for n in able if ops[n].own_ring or fit(ops[n]))

    large = those(lambda op: op.remote_bytes >= LEAST_REMOTE_BYTES)
    larger = those(lambda op: op.remote_bytes >= _FEW_BYTES)
    waiting = those(lambda op: op.remote_bytes >= LEAST_REMOTE_BYTES and op.link >= op.local)
    seen: set[tuple[int, ...]] = {()}
    for chosen, reason in (
        (large, "few bytes of it are remote"),
        (larger, "few bytes of it are remote"),
        (waiting, "its remote bytes arrive while its local ones are read"),
    ):
        if chosen not in seen:
            seen.add(chosen)
            yield chosen, reason


def _planned(
    ops: Sequence[StepOp],
    chosen: tuple[int, ...],
    reason: str,
    rates: LinkRates,
    ring: Ring,
    in_parts: tuple[int, ...],
) -> StepPlan | None:
    """None where no row of a product fits the ring. Those `in_parts` are not one launch."""
    groups: list[list[Part]] = []
    staged, launched = set(), set()
    for number in chosen:
        op = ops[number]
        whole = _may_launch(op, ring) and number not in in_parts
        largest = ring.nbytes if whole else ring.nbytes // PARTS_IN_RING
        parts = [
            part
            for weight, span in enumerate(op.weights)
            for part in _parts(number, weight, span, largest)
        ]
        if any(part.size > largest for part in parts):
            continue
        staged.add(number)
        if whole:
            launched.add(number)
            groups.append(parts)
        else:
            groups += [[part] for part in parts]
    if not groups:
        return None
    parts = [part for group in groups for part in group]
    sizes = [[part.size for part in group] for group in groups]
    ring_bytes = min(ring.nbytes, sum(map(side_by_side, sizes)))
    at = places(sizes, ring_bytes)
    timeline = simulate(ops, parts, at, rates, launched)
    steps = tuple(
        OpStep("staged", _STAGED, timeline.orders[number], number in launched)
        if number in staged
        else OpStep("direct", op.refusal or reason)
        for number, op in enumerate(ops)
    )
    direct = sum(op.before + op.direct for op in ops)
    return StepPlan(
        steps, tuple(parts), tuple(at), ring_bytes, timeline.seconds, direct, timeline.work
    )


def _parts(op: int, weight: int, span: RowSpan, largest: int) -> Iterator[Part]:
    """The rows that go through the ring, in equal parts that start at multiples of 8."""
    rows = span.rows - span.start
    if not rows:
        return
    number = math.ceil(rows * span.row_bytes / largest)
    each = math.ceil(rows / number / _ROWS) * _ROWS
    if each * span.row_bytes > largest:
        each = max(_ROWS, largest // span.row_bytes // _ROWS * _ROWS)
    for start in range(span.start, span.rows, each):
        stop = min(start + each, span.rows)
        yield Part(op, weight, start, stop, min(max(span.remote, start), stop), span.row_bytes)
