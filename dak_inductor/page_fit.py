"""A plan whose local pages fit: bytes are planned, and memory is held by the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dak_inductor.hardware_profile import HardwareProfile
from dak_inductor.plan import Plan, PlanProblem
from dak_inductor.planner import make_plan

_ROUNDS = 8


def plan_in_pages(
    problem: PlanProblem,
    profile: HardwareProfile,
    held: Callable[[Plan], int],
    *,
    available: int,
    page_bytes: int,
    wanted: int,
    most: int,
) -> tuple[Plan, int]:
    """A plan with at least `wanted` remote bytes, at most `most`, and the bytes that it holds.

    They are no more than `available` where such a plan was found; the caller looks.

    Args:
        held: bytes of the local pages under a plan.

    Raises BudgetError, as `make_plan` does.
    """
    for _ in range(_ROUNDS):
        plan = make_plan(replace(problem, remote_bytes=min(wanted, most)), profile)
        pages = held(plan)
        if pages <= available or wanted >= most:
            break
        # Pages that are local in part cost a whole page; whole pages have to go.
        wanted += -(-(pages - available) // page_bytes) * page_bytes
    return plan, pages
