"""The planner's bound: no placement is cheaper, and it is convex in what must leave."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from dak_inductor.benchmarks.harness.planner_problems import on_the_grid, random_problem
from dak_inductor.cost_model import op_floor, op_time
from dak_inductor.hardware_profile import HardwareProfile
from dak_inductor.plan import Plan, PlanProblem
from dak_inductor.planner import make_plan

from .profiles import examples

seeds = st.integers(0, 10**6)


def possible(problem: PlanProblem) -> int:
    return sum(s.nbytes if s.max_remote is None else s.max_remote for s in problem.tensors)


def planned(problem: PlanProblem, profile: HardwareProfile, share: float) -> Plan:
    asked = int(share * possible(problem))
    return make_plan(replace(problem, remote_bytes=asked), profile)


@given(seeds)
@examples(40)
def test_no_placement_is_cheaper_than_the_bound_of_as_many_bytes(seed: int) -> None:
    problem, profile = random_problem(seed)
    problem = on_the_grid(problem)
    rng = random.Random(seed)
    link = profile.link(problem.remote)
    splits = {}
    for spec in problem.tensors:
        least, most = spec.min_remote, spec.nbytes if spec.max_remote is None else spec.max_remote
        splits[spec.name] = rng.choice((least, most, rng.randint(least, most)))
    plan = make_plan(replace(problem, remote_bytes=sum(splits.values())), profile)
    seen, cost = set(), 0.0
    for use in problem.uses:
        time = op_time(use, splits[use.tensor] / plan.sizes[use.tensor], profile, link)
        time -= op_floor(use.kind, profile) if (use.graph, use.op) in seen else 0.0
        seen.add((use.graph, use.op))
        cost += use.calls * time
    assert cost >= plan.objective_bound * (1 - 1e-9)


@given(seeds)
@examples(30)
def test_the_bound_is_convex_in_the_bytes_that_must_leave(seed: int) -> None:
    """So more GPU memory buys less and less; below the balance share it may even cost a little."""
    problem, profile = random_problem(seed)
    problem = on_the_grid(problem)
    problem = replace(problem, tensors=tuple(replace(s, min_remote=0) for s in problem.tensors))
    most = possible(problem) // 8 * 8
    bounds = [
        make_plan(replace(problem, remote_bytes=most * n // 8), profile).objective_bound
        for n in range(9)
    ]
    steps = [after - before for before, after in pairwise(bounds)]
    assert all(after >= before - 1e-9 * bounds[-1] for before, after in pairwise(steps))
    turn = next((n for n, step in enumerate(steps) if step >= 0), 8)
    assert all(step >= -1e-9 * bounds[-1] for step in steps[turn:])


@given(seeds, st.floats(0, 1))
@examples(30)
def test_a_plan_is_the_same_in_any_order_with_any_names(seed: int, share: float) -> None:
    """Names break ties only: the objective stays."""
    problem, profile = random_problem(seed)
    problem = on_the_grid(problem)
    names = [spec.name for spec in problem.tensors]
    other = dict(zip(names, reversed([f"x{name}" for name in names]), strict=True))
    renamed = replace(
        problem,
        tensors=tuple(replace(spec, name=other[spec.name]) for spec in problem.tensors),
        uses=tuple(replace(use, tensor=other[use.tensor]) for use in problem.uses),
    )
    one, two = planned(problem, profile, share), planned(renamed, profile, share)
    assert abs(one.objective_bound - two.objective_bound) <= 1e-9 * one.objective_bound
    assert abs(one.objective - two.objective) <= 1e-3 * one.objective


@given(seeds)
@examples(25)
def test_more_gpu_memory_never_costs_time(seed: int) -> None:
    """Up to rounding, and where more leaves than would save time: a plan sends no byte away
    unasked, though up to the balance share that would be faster by the model."""
    problem, profile = random_problem(seed)
    problem = on_the_grid(problem)
    most = possible(problem)
    plans = [make_plan(replace(problem, remote_bytes=most * n // 6), profile) for n in range(7)]
    cheapest = min(range(7), key=lambda n: plans[n].objective_bound)
    for more, less in pairwise(plans[cheapest:]):  # of GPU memory
        assert more.objective_bound <= less.objective_bound * (1 + 1e-9)
        assert more.objective <= less.objective * (1 + 1e-3)
