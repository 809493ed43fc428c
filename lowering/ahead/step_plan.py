"""Which products of a step are staged, where their parts go, and what that is predicted to take."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from dak_inductor.copy_ring import LAUNCHES_IN_RING, MARGIN, PARTS_IN_RING, RING_BYTES
from dak_inductor.lowering.ahead.ring_places import Place, places, side_by_side
from dak_inductor.lowering.ahead.step_op import LinkRates, RowSpan, StepOp
from dak_inductor.lowering.ahead.timeline import Part, simulate
from dak_inductor.lowering.host_cost import COPY_SECONDS, staged_seconds
from dak_inductor.options import Strategy

LEAST_RING_BYTES = 4 * 2**20
LEAST_REMOTE_BYTES = 128 * 2**10
"""Of a product that `auto` may stage: less is read directly while a copy would start."""

_ROWS = 8
_STAGED = "its remote rows are copied ahead"
_FEW_BYTES = 2 * 2**20
"""Of products that `auto` also tries to leave direct: what an own copy costs is what it saves."""


@dataclass(frozen=True, slots=True)
class OpStep:
    """How one product runs, and why.

    order: parts and `timeline.LOCAL`; () for a direct one.
    launched: one launch of the kernel reads all parts in the ring and the other rows in place.
    """

    strategy: Literal["direct", "staged"]
    reason: str
    order: tuple[int, ...] = ()
    launched: bool = False


@dataclass(frozen=True, slots=True)
class StepPlan:
    """`parts` are copied and read in their order, part i through `at[i]`.

    Attributes:
        ring_bytes: 0 where nothing is staged.
        seconds: predicted of the products as planned; `direct_seconds` with none staged.
        host_seconds: what of `seconds` the host is busy; 0 in a CUDA graph.
    """

    ops: tuple[OpStep, ...]
    parts: tuple[Part, ...]
    at: tuple[Place, ...]
    ring_bytes: int
    seconds: float
    direct_seconds: float
    host_seconds: float = 0.0

    @property
    def staged(self) -> int:
        """How many products are."""
        return sum(op.strategy == "staged" for op in self.ops)

    @property
    def waits_for_host(self) -> bool:
        """Whether the GPU is predicted to end before the host has queued all."""
        return 0.0 < self.seconds <= self.host_seconds


@dataclass(frozen=True, slots=True)
class StepPlans:
    """Of one step: `captured` for CUDA graphs, whose replays take what the GPU takes; `eager`
    outside of them, where a step takes no less than the host does to queue it."""

    captured: StepPlan
    eager: StepPlan

    def of(self, *, captured: bool) -> StepPlan:
        return self.captured if captured else self.eager


def choose(
    ops: Sequence[StepOp],
    rates: LinkRates,
    *,
    strategy: Strategy,
    room: int,
    charged: bool = False,
) -> StepPlans:
    """For "staged" every product that can be, for "auto" what is predicted to be faster than direct
    reads by a margin.

    Args:
        room: bytes of device memory that the ring may have.
        charged: they are taken from weights, which are remote for it.
    """
    most = min(room, RING_BYTES)
    found: list[StepPlan] = []
    reason = "little or nothing of it is remote"
    if strategy == "direct":
        reason = "asked for"
    elif most < LEAST_RING_BYTES:
        reason = "no room for a ring"
    else:
        for chosen, why in _candidates(ops, strategy):
            for size in _ring_sizes(most, charged, [ops[number] for number in chosen]):
                last = chosen[-1:] if _may_launch(ops[chosen[-1]], size) else ()
                for in_parts in dict.fromkeys(((), last)):
                    plan = _planned(ops, chosen, why, rates, size, in_parts)
                    if plan is not None:
                        found.append(plan)
    price = partial(_paid, ops, rates) if charged else _seconds
    least = MARGIN if strategy == "auto" else None
    return StepPlans(
        captured=_best(ops, found, reason, price, least),
        eager=_best(ops, found, reason, price, least, host=True),
    )


def _seconds(plan: StepPlan) -> float:
    return plan.seconds


def _paid(ops: Sequence[StepOp], rates: LinkRates, plan: StepPlan) -> float:
    """Seconds of a plan for whose ring weights make room: its bytes of them come over the link as
    well, which may have time for it."""
    copies = sum(rates.copy_seconds(part.copied) for part in plan.parts)
    read = sum(op.link for op, step in zip(ops, plan.ops, strict=True) if step.strategy == "direct")
    return max(plan.seconds, copies + read + plan.ring_bytes / rates.copy)


def _best(
    ops: Sequence[StepOp],
    found: Sequence[StepPlan],
    reason: str,
    price: Callable[[StepPlan], float],
    least: float | None,
    *,
    host: bool = False,
) -> StepPlan:
    """The fastest of `found`; all direct where there is none, for `reason`, or where it saves less
    than a share of `least`.

    Args:
        price: the seconds by which plans are compared.
        host: outside of CUDA graphs.
    """
    if found:
        plans = [_with_host(plan, ops) for plan in found] if host else found
        best = min(plans, key=lambda plan: (price(plan), plan.ring_bytes))
        seconds = price(best)
        if least is None or seconds <= (1 - least) * best.direct_seconds:
            return best
        whose = " of the host" if best.waits_for_host else ""
        reason = f"staged {seconds * 1e3:.3f} ms{whose}, direct {best.direct_seconds * 1e3:.3f} ms"
    seconds = sum(op.direct for op in ops)
    steps = tuple(OpStep("direct", op.refusal or reason) for op in ops)
    direct = StepPlan(steps, (), (), 0, seconds, seconds)
    return _with_host(direct, ops) if host else direct


def _with_host(plan: StepPlan, ops: Sequence[StepOp]) -> StepPlan:
    """Outside of CUDA graphs: the GPU waits for the host, or the host for nothing."""
    parts = Counter(part.op for part in plan.parts)
    host = 0.0
    for number, (op, step) in enumerate(zip(ops, plan.ops, strict=True)):
        if step.launched:
            host += op.host + parts[number] * COPY_SECONDS
        else:
            host += staged_seconds(parts[number]) if number in parts else op.host
    return replace(
        plan,
        seconds=max(plan.seconds, host),
        direct_seconds=max(plan.direct_seconds, sum(op.host for op in ops)),
        host_seconds=host,
    )


def _ring_sizes(most: int, charged: bool, staged: Sequence[StepOp]) -> Iterator[int]:
    """To try: the largest; where each byte has its price, halves of it as well, and what the
    largest product needs that is one launch."""
    yield most
    if not charged:
        return
    launches = [_ring_bytes(op) for op in staged if _may_launch(op, most)]
    enough = LAUNCHES_IN_RING * max(launches, default=0)
    if LEAST_RING_BYTES <= enough < most:
        yield enough
    while (most := most // 2) >= LEAST_RING_BYTES:
        yield most


def _may_launch(op: StepOp, most: int) -> bool:
    """Whether one launch reads it through a ring of so many bytes: both of its weights in the ring
    from the same row on, where both are."""
    starts = {span.start for span in op.weights if span.start < span.rows}
    return op.launch > 0 and len(starts) == 1 and LAUNCHES_IN_RING * _ring_bytes(op) <= most


def _ring_bytes(op: StepOp) -> int:
    """Of all of its parts."""
    return side_by_side((span.rows - span.start) * span.row_bytes for span in op.weights)


def _candidates(ops: Sequence[StepOp], strategy: Strategy) -> Iterator[tuple[tuple[int, ...], str]]:
    """Which products to stage, and why the others are not; each choice once."""
    able = [number for number, op in enumerate(ops) if op.remote_bytes > 0]
    if strategy == "staged":
        if able:
            yield tuple(able), "nothing of it is remote"
        return
    large = tuple(n for n in able if ops[n].remote_bytes >= LEAST_REMOTE_BYTES)
    larger = tuple(n for n in large if ops[n].remote_bytes >= _FEW_BYTES)
    waiting = tuple(n for n in large if ops[n].link >= ops[n].local)
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
    most: int,
    in_parts: tuple[int, ...],
) -> StepPlan | None:
    """None where no row of a product fits the ring.

    Those `in_parts` are not one launch. So the last product may read its local rows while the link
    still copies, and what shows behind the last copy is a part.
    """
    groups: list[list[Part]] = []
    staged, launched = set(), set()
    for number in chosen:
        op = ops[number]
        whole = _may_launch(op, most) and number not in in_parts
        largest = most if whole else most // PARTS_IN_RING
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
    ring_bytes = min(most, sum(map(side_by_side, sizes)))
    at = places(sizes, ring_bytes)
    timeline = simulate(ops, parts, at, rates, launched)
    steps = tuple(
        OpStep("staged", _STAGED, timeline.orders[number], number in launched)
        if number in staged
        else OpStep("direct", op.refusal or reason)
        for number, op in enumerate(ops)
    )
    direct = sum(op.direct for op in ops)
    return StepPlan(steps, tuple(parts), tuple(at), ring_bytes, timeline.seconds, direct)


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
