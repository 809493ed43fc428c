"""The staged path outside of graphs, where the host's time counts as well.

A replay queues a whole graph at once. A call queues part after part, each with a copy on a queue of
its own and marks between the queues, and that may take the host longer than the card takes to run
them. Then fewer parts are faster, or a few one after the other on one queue.
"""

from __future__ import annotations

from dak_inductor.hardware_profile import HardwareProfile, LinkProfile
from dak_inductor.lowering.element_types import ELEMENT_BYTES
from dak_inductor.lowering.host_cost import IN_LINE_SECONDS, RING_PART_SECONDS, RING_SECONDS
from dak_inductor.lowering.linear import ring_plan
from dak_inductor.lowering.linear.problem import LinearProblem
from dak_inductor.lowering.linear.ring_plan import Part, Residency, RingPlan
from dak_inductor.lowering.linear.ring_timing import RingTiming


def choose_for_calls(
    problem: LinearProblem,
    residency: tuple[Residency, ...],
    profile: HardwareProfile,
    link: LinkProfile,
) -> RingPlan:
    """The plan that ends first where another call follows at once: of those for the card with the
    host's time, and of few parts in line."""
    plan = ring_plan.choose(problem, residency, profile, link, cost=call_seconds)
    if host_seconds(plan) <= plan.seconds:
        return plan
    simple = _in_line(problem, residency, RingTiming(problem, residency, profile, link))
    return plan if simple is None else min(plan, simple, key=call_seconds)


def host_seconds(plan: RingPlan) -> float:
    """That the host takes to queue it."""
    each = IN_LINE_SECONDS if plan.in_line else RING_PART_SECONDS
    return RING_SECONDS + len(plan.staged) * each


def call_seconds(plan: RingPlan) -> float:
    """Of a call among others: the slower of host and card bounds them."""
    return max(plan.seconds, host_seconds(plan))


def _in_line(
    problem: LinearProblem, residency: tuple[Residency, ...], timing: RingTiming
) -> RingPlan | None:
    """Of each weight one part in place and one through a slot; None where the ring is too small."""
    parts: list[Part] = []
    for weight, where in enumerate(residency):
        local = ring_plan.features_in_place(problem, where)
        if local:
            parts.append(Part(weight, 0, local, staged=False))
        if local < problem.n:
            parts.append(Part(weight, local, problem.n, staged=True))
    staged = [part for part in parts if part.staged]
    slots = tuple(part.features for part in staged)
    if sum(slots) * problem.k * ELEMENT_BYTES > ring_plan.RING_BYTES:
        return None
    seconds = sum(map(timing.copy, staged)) + timing.epilogue
    seconds += sum(timing.multiply(part.features) for part in parts)
    return RingPlan(tuple(parts), slots, seconds, copy_bound=True, in_line=True)
