"""A known step planned: with the splits of this moment, or with others to see what it would take.

Both are one function, so that a placement is judged by what the step would really do with it.
"""

from __future__ import annotations

from dak_inductor.errors import ProfileError
from dak_inductor.lowering.ahead.plan_choice import choose
from dak_inductor.lowering.ahead.ring_room import Room
from dak_inductor.lowering.ahead.sequence import CallSequence, SplitOf, present_split
from dak_inductor.lowering.ahead.step_costs import link_rates, step_ops, tier_of
from dak_inductor.lowering.ahead.step_plan import StepPlans
from dak_inductor.lowering.gpu_profile import profile_of
from dak_inductor.options import Strategy


def plans_of(
    sequence: CallSequence,
    room: Room,
    *,
    strategy: Strategy,
    device_index: int,
    split_of: SplitOf = present_split,
) -> StepPlans | None:
    """The fastest plans of the step; None where the memory of a weight is gone.

    Args:
        split_of: the split that a buffer is to have.

    Raises ProfileError where the profile of the GPU has no link to the step's remote tier.
    """
    calls = sequence.calls
    tier, profile = tier_of(calls), profile_of(device_index)
    ops = step_ops(calls, tier, device_index, split_of=split_of)
    spared = step_ops(calls, tier, device_index, split_of=split_of, spared=True)
    if ops is None or spared is None:
        return None
    return choose(
        ops,
        link_rates(profile, profile.link(tier)),
        strategy=strategy,
        room=room.nbytes,
        charged=room.charged,
        spared=spared,
    )


def predicted_seconds(
    sequence: CallSequence,
    room: Room,
    *,
    strategy: Strategy,
    device_index: int,
    split_of: SplitOf,
) -> float | None:
    """Seconds of the step's products in a CUDA graph, by `plans_of`.

    None where that has no plans, where the link is not known, where nothing is known of a product,
    and of many tokens: which way serves those is measured at the splits that they have, and
    estimates of two ways differ by more than placements do.
    """
    known = all(call.facts is not None for call in sequence.calls)
    if not known or not sequence.of_few_tokens:
        return None
    try:
        plans = plans_of(
            sequence, room, strategy=strategy, device_index=device_index, split_of=split_of
        )
    except ProfileError:
        return None
    return None if plans is None else plans.captured.seconds
