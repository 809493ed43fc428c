"""What more GPU memory would buy: plans of fewer and fewer remote bytes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dak_inductor as dak
from dak_inductor.benchmarks.harness.planner_problems import on_the_grid, random_problem
from dak_inductor.memory_curve import _amounts, memory_curve
from dak_inductor.planner import make_plan

GIB = 1 << 30


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_each_point_is_the_plan_of_its_bytes(seed: int) -> None:
    problem, profile = random_problem(seed)
    problem = on_the_grid(problem)
    points = memory_curve(problem, profile, problem.remote_bytes)
    least = sum(spec.min_remote for spec in problem.tensors)
    assert points[0].more_bytes == 0
    assert points[-1].more_bytes == max(0, problem.remote_bytes - least)
    for before, after in pairwise(points):
        assert after.more_bytes > before.more_bytes
        assert after.remote_bytes <= before.remote_bytes
    specs = tuple(replace(spec, current_remote=None) for spec in problem.tensors)
    for point in points:
        asked = problem.remote_bytes - point.more_bytes
        plan = make_plan(replace(problem, tensors=specs, remote_bytes=asked), profile)
        assert point.remote_bytes == plan.remote_bytes >= asked
        assert point.step_times == dict(plan.step_times)


@pytest.mark.parametrize(
    ("movable", "amounts"),
    [
        (-1, ()),
        (0, ()),
        (3, (1, 3)),
        (GIB, (GIB // 4, GIB // 2, GIB)),
        (2 * GIB, (GIB, 2 * GIB)),
        (5 * GIB, (GIB, 2 * GIB, 4 * GIB, 5 * GIB)),
    ],
)
def test_points_are_powers_of_two_or_quarters(movable: int, amounts: tuple[int, ...]) -> None:
    assert _amounts(movable) == amounts


def test_explain_shows_the_curve() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(6)))
    dak.offload(model, offload_ratio=0.5, remote="simulated")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="dak")
    with torch.no_grad():
        compiled(torch.randn(2, 256))
    found = dak.explain(model)
    remote = found.placed.remote
    assert [point.more_bytes for point in found.curve] == [0, remote // 4, remote // 2, remote]
    assert found.curve[-1].remote_bytes == 0
    assert "what more GPU memory would buy" in str(found)
    whole = torch.nn.Linear(256, 256)
    dak.offload(whole, offload_ratio=0.0, remote="simulated")
    assert dak.explain(whole).curve == ()
