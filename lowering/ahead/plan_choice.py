"""The plan that a step follows: the fastest predicted, what its ring costs included."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from dak_inductor.copy_ring import MARGIN, ring_within
from dak_inductor.lowering.ahead.staged_plans import EVEN, staged_plans
from dak_inductor.lowering.ahead.step_op import LinkRates, StepOp
from dak_inductor.lowering.ahead.step_plan import OpStep, StepPlan, StepPlans
from dak_inductor.lowering.host_cost import COPY_SECONDS, staged_seconds
from dak_inductor.options import Strategy

_OTHER_WORK = 0.25
"""Of the work of a plan, what counts where the link is predicted to hide it. It may not: with 64
sequences and 2% remote, parts that were to save 0.5% took 13% more than prefetched layers. The work
between products was not known then."""


def choose(
    ops: Sequence[StepOp],
    rates: LinkRates,
    *,
    strategy: Strategy,
    room: int,
    charged: bool = False,
    spared: Sequence[StepOp] = (),
) -> StepPlans:
    """For "staged" every product that can be, for "auto" what is predicted to be faster than direct
    reads by a margin.

    Args:
        room: bytes of device memory that the ring may have.
        charged: they are taken from weights, which are remote for it.
        spared: the same products with the ways that spare the host.
    """
    most = ring_within(room)
    least = MARGIN if strategy == "auto" else None

    def price_of(ops: Sequence[StepOp]) -> Callable[[StepPlan], float]:
        return partial(_paid, ops, rates) if charged else _seconds

    def candidates(ops: Sequence[StepOp]) -> tuple[list[StepPlan], str]:
        """With the reason why there are none."""
        if strategy == "direct":
            return [], "asked for"
        if not most:
            return [], "no room for a ring"
        rank = partial(_rank, price_of(ops))
        found = staged_plans(ops, rates, strategy, most, rank)
        return found, "little or nothing of it is remote"

    found = candidates(ops)
    captured = _best(ops, *found, price_of(ops), least)
    # what the host takes between products is not known, so what the GPU does there is left out too
    bare, sparing = _products_alone(ops), _products_alone(spared)
    if bare != list(ops):
        found = candidates(bare)
    eager = _best(bare, *found, price_of(bare), least, host=True)
    if eager.waits_for_host and sparing and sparing != bare:
        other = _best(sparing, *candidates(sparing), price_of(sparing), least, host=True)
        eager = min(eager, replace(other, spares_host=True), key=_seconds)
    return StepPlans(captured, eager)


def _products_alone(ops: Sequence[StepOp]) -> list[StepOp]:
    return [replace(op, before=0.0) if op.before else op for op in ops]


def _rank(price: Callable[[StepPlan], float], plan: StepPlan) -> float:
    return price(plan) + _OTHER_WORK * plan.work


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
    """The fastest of `found`, of even ones that with the smallest ring; all direct where there is
    none, for `reason`, or where it saves less than a share of `least`.

    Args:
        price: seconds, by which plans are compared with all direct; with each other by `_rank`.
        host: outside of CUDA graphs.
    """
    if found:
        plans = [_with_host(plan, ops) for plan in found] if host else found
        best = _smallest_ring([(_rank(price, plan), plan) for plan in plans])
        seconds = price(best)
        if least is None or seconds <= (1 - least) * best.direct_seconds:
            return best
        whose = " of the host" if best.waits_for_host else ""
        reason = f"staged {seconds * 1e3:.3f} ms{whose}, direct {best.direct_seconds * 1e3:.3f} ms"
    seconds = sum(op.before + op.direct for op in ops)
    steps = tuple(OpStep("direct", op.refusal or reason) for op in ops)
    direct = StepPlan(steps, (), (), 0, seconds, seconds, seconds)
    return _with_host(direct, ops) if host else direct


def _smallest_ring(plans: Sequence[tuple[float, StepPlan]]) -> StepPlan:
    """Of those about as good as the best, by rank."""
    limit = (1 + EVEN) * min(rank for rank, _ in plans)
    even = [entry for entry in plans if entry[0] <= limit]
    return min(even, key=lambda entry: (entry[1].ring_bytes, entry[0]))[1]


def _with_host(plan: StepPlan, ops: Sequence[StepOp]) -> StepPlan:
    """Outside of CUDA graphs: the GPU waits for the host, or the host for nothing."""
    parts = Counter(part.op for part in plan.parts)
    host = 0.0
    for number, (op, step) in enumerate(zip(ops, plan.ops, strict=True)):
        if step.launched:
            host += op.host + parts[number] * COPY_SECONDS
        else:
            staged = number in parts
            host += staged_seconds(parts[number]) + op.following if staged else op.host
    return replace(
        plan,
        seconds=max(plan.seconds, host),
        direct_seconds=max(plan.direct_seconds, sum(op.host for op in ops)),
        host_seconds=host,
    )
