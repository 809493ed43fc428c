"""The ways in which a product can run, and in which order the estimates have them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from dak_inductor.lowering.gpu_profile import profile_of
from dak_inductor.lowering.linear import ring_plan
from dak_inductor.lowering.linear.call_facts import CallFacts
from dak_inductor.lowering.linear.configuration import (
    DECODE_TOKENS,
    MAXIMUM_TOKENS,
    LinearConfiguration,
    choose,
    direct_seconds,
)
from dak_inductor.lowering.linear.launch import worker_count
from dak_inductor.lowering.linear.problem import LinearProblem
from dak_inductor.lowering.linear.ring_plan import prefers_ring

WayName = Literal["direct", "ring", "stock"]

STOCK_TOKENS = 512
"""Up to this many tokens the stock operator is among the ways. Each of its tiles of tokens reads
the remote part again, so beyond it loses: measured on the H200 1.14 times the direct kernel's time
at 128 tokens, 6.7 times the ring's at 2048."""


@dataclass(frozen=True, slots=True)
class Way:
    """The kernel in one configuration, the ring, or the stock operator on the divided tensor.

    `seconds` is the estimate; None for the stock operator, whose kernels no model predicts.
    """

    name: WayName
    seconds: float | None = None
    configuration: LinearConfiguration | None = None


RING_ALONE = (Way("ring"),)
_STOCK = Way("stock")


@lru_cache(maxsize=4096)
def ways_of(facts: CallFacts) -> tuple[Way, ...]:
    """The ways worth a trial, first the one that the estimates choose.

    Remote bytes decide on speed only: whatever is chosen stays right when pages move.
    """
    problem, remote_bytes, device_index = facts.problem, facts.remote_bytes, facts.device_index
    if problem.m > MAXIMUM_TOKENS:
        return RING_ALONE
    profile = profile_of(device_index)
    configuration = choose(
        problem,
        profile,
        lambda configuration: worker_count(configuration, device_index),
        may_pair=not any(remote_bytes) and not facts.in_graph,
    )
    link = profile.link(facts.tier)
    found = []
    if configuration is not None:
        seconds = direct_seconds(
            problem,
            configuration,
            profile,
            link,
            workers=worker_count(configuration, device_index),
            remote_bytes=sum(remote_bytes),
        )
        found.append(Way("direct", seconds, configuration))
    if problem.m > DECODE_TOKENS or not found:
        ring = Way("ring", ring_plan.estimate(problem, remote_bytes, profile, link))
        if not found or prefers_ring(problem, remote_bytes, profile, link, seconds):
            found.insert(0, ring)
        else:
            found.append(ring)
    if _stock_may_win(problem, remote_bytes):
        found.append(_STOCK)
    return tuple(found)


def _stock_may_win(problem: LinearProblem, remote_bytes: tuple[int, ...]) -> bool:
    """With nothing remote the ring of a prefill is the stock product in place."""
    if problem.m <= DECODE_TOKENS:
        return True
    return problem.m <= STOCK_TOKENS and any(remote_bytes)
