"""What a known step would take with other splits than those of this moment."""

from __future__ import annotations

from dak_inductor.errors import ProfileError
from dak_inductor.lowering.ahead.plan_choice import choose
from dak_inductor.lowering.ahead.sequence import CallSequence, SplitOf
from dak_inductor.lowering.ahead.step_costs import link_rates, step_ops, tier_of
from dak_inductor.lowering.linear.configuration import DECODE_TOKENS
from dak_inductor.lowering.linear.launch import profile_of
from dak_inductor.options import Strategy


def predicted_seconds(
    sequence: CallSequence,
    split_of: SplitOf,
    *,
    strategy: Strategy,
    room: int,
    charged: bool,
    device_index: int,
) -> float | None:
    """Seconds of its products in a CUDA graph, planned as the step itself is.

    Args:
        split_of: the split that a buffer is to have.
        room, charged: as `plan_choice.choose` has them.

    None where the memory of one is gone or nothing is known of it, and of many tokens: which way
    serves those is measured at the splits that they have, and estimates of two ways differ by more
    than placements do.
    """
    calls = sequence.calls
    if any(call.facts is None or call.facts.problem.m > DECODE_TOKENS for call in calls):
        return None
    tier, profile = tier_of(calls), profile_of(device_index)
    ops = step_ops(calls, tier, device_index, split_of=split_of)
    if ops is None:
        return None
    try:
        rates = link_rates(profile, profile.link(tier))
    except ProfileError:
        return None
    plans = choose(ops, rates, strategy=strategy, room=room, charged=charged)
    return plans.captured.seconds
