"""Which products of a step are staged, where their parts go, and what that is predicted to take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from dak_inductor.lowering.ahead.ring_places import Place, places, ring_bytes_for
from dak_inductor.lowering.ahead.step_op import LinkRates, RowSpan, StepOp
from dak_inductor.lowering.ahead.timeline import Part, simulate
from dak_inductor.options import Strategy

RING_BYTES = 32 * 2**20
"""Device memory of the ring at most: it bridges 0.6 ms of work without a copy on a PCIe link, and
each of its bytes is one of weights that is remote instead where `gpu_memory` is what binds."""
LEAST_RING_BYTES = 4 * 2**20
LEAST_REMOTE_BYTES = 128 * 2**10
"""Of a product that `auto` may stage: less is read directly while a copy would start."""

_IN_RING = 3  # of the largest parts: one is copied, one is read, one lies ready
_ROWS = 8
_MARGIN = 0.03  # what staging must save
_FEW_BYTES = 2 * 2**20
"""Of products that `auto` also tries to leave direct: what an own copy costs is what it saves."""


@dataclass(frozen=True, slots=True)
class OpStep:
    """How one product runs, and why.

    order: parts and `timeline.LOCAL`; () for a direct one.
    """

    strategy: Literal["direct", "staged"]
    reason: str
    order: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """`parts` are copied and read in their order, part i through `at[i]`.

    Attributes:
        ring_bytes: 0 where nothing is staged.
        seconds: predicted of the products as planned; `direct_seconds` with none staged.
    """

    ops: tuple[OpStep, ...]
    parts: tuple[Part, ...]
    at: tuple[Place, ...]
    ring_bytes: int
    seconds: float
    direct_seconds: float

    @property
    def staged(self) -> int:
        """How many products are."""
        return sum(op.strategy == "staged" for op in self.ops)


def choose(
    ops: Sequence[StepOp],
    rates: LinkRates,
    *,
    strategy: Strategy,
    room: int,
    charged: bool = False,
) -> StepPlan:
    """For "staged" every product that can be, for "auto" what is predicted to be faster than direct
    reads by a margin.

    Args:
        room: bytes of device memory that the ring may have.
        charged: they are taken from weights, which are remote for it.
    """
    direct = sum(op.direct for op in ops)
    if strategy == "direct":
        return _all_direct(ops, direct, "asked for")
    most = min(room, RING_BYTES)
    if most < LEAST_RING_BYTES:
        return _all_direct(ops, direct, "no room for a ring")

    def price(plan: StepPlan) -> float:
        return plan.ring_bytes / rates.copy if charged else 0.0

    found: list[StepPlan] = []
    for chosen, reason in _candidates(ops, strategy):
        for size in _ring_sizes(most, charged):
            plan = _planned(ops, chosen, reason, rates, size, direct)
            if plan is not None:
                found.append(plan)
    if not found:
        return _all_direct(ops, direct, "little or nothing of it is remote")
    best = min(found, key=lambda plan: plan.seconds + price(plan))
    seconds = best.seconds + price(best)
    if strategy == "auto" and seconds > (1 - _MARGIN) * direct:
        why = f"staged {seconds * 1e3:.3f} ms, direct {direct * 1e3:.3f} ms"
        return _all_direct(ops, direct, why)
    return best


def _all_direct(ops: Sequence[StepOp], seconds: float, reason: str) -> StepPlan:
    steps = tuple(OpStep("direct", op.refusal or reason) for op in ops)
    return StepPlan(steps, (), (), 0, seconds, seconds)


def _ring_sizes(most: int, charged: bool) -> Iterator[int]:
    """To try: the largest, and halves of it where each byte has its price."""
    yield most
    while charged and (most := most // 2) >= LEAST_RING_BYTES:
        yield most


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
    direct: float,
) -> StepPlan | None:
    """None where no row of a product fits the ring."""
    largest = most // _IN_RING
    parts: list[Part] = []
    staged = set()
    for number in chosen:
        cut = [
            list(_parts(number, weight, span, largest))
            for weight, span in enumerate(ops[number].weights)
        ]
        if any(part.size > largest for each in cut for part in each):
            continue
        staged.add(number)
        parts.extend(part for each in cut for part in each)
    if not parts:
        return None
    sizes = [part.size for part in parts]
    ring_bytes = ring_bytes_for(sizes, most)
    at = places(sizes, ring_bytes)
    timeline = simulate(ops, parts, at, rates)
    steps = tuple(
        OpStep("staged", "its remote rows are copied ahead", timeline.orders[number])
        if number in staged
        else OpStep("direct", op.refusal or reason)
        for number, op in enumerate(ops)
    )
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
