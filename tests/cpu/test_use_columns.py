"""Costs by column: the figures of one use, for all at once."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from dak_inductor.benchmarks.harness.planner_problems import random_problem
from dak_inductor.cost_curve import cost_lines
from dak_inductor.hardware import load
from dak_inductor.plan import OpUse, PlanProblem, TensorSpec
from dak_inductor.planner import make_plan
from dak_inductor.split_grid import split_grid
from dak_inductor.use_columns import LIMITS, UseColumns

SEEDS = range(20)


def columns_of(seed: int) -> tuple[UseColumns, list[int]]:
    """Of a random problem, some of it still to come or never remote, and bytes of each tensor."""
    rng = random.Random(seed)
    problem, profile = random_problem(seed)
    uses = [replace(use, untouched_share=rng.choice((0.0, 0.4))) for use in problem.uses]
    uses.append(OpUse("norm", "graph0", "", "pointwise", 0.0, 1e6, 0.0, 1.0))
    problem = replace(problem, uses=tuple(uses))
    grids = [split_grid(spec) for spec in problem.tensors]
    lines = cost_lines(problem, profile, profile.link(problem.remote))
    remote = [rng.choice((0, rng.randint(0, grid.nbytes), grid.nbytes)) for grid in grids]
    return UseColumns(problem, profile, lines, grids), remote


@pytest.mark.parametrize("seed", SEEDS)
def test_columns_are_what_each_use_costs_to_the_last_bit(seed: int) -> None:
    columns, remote = columns_of(seed)
    shares = columns.shares(remote)
    each = list(zip(columns.lines, shares.tolist(), strict=True))
    assert columns.direct(shares).tolist() == [
        line.cost.time(share) + line.floor for line, share in each
    ]
    assert columns.far(shares).tolist() == [
        line.cost.touched(share) * line.use.touched_bytes for line, share in each
    ]
    assert columns.alone.tolist() == [line.cost.time(0.0) + line.floor for line, _ in each]


@pytest.mark.parametrize("seed", SEEDS)
def test_limits_name_the_line_that_is_on_top(seed: int) -> None:
    columns, remote = columns_of(seed)
    shares = columns.shares(remote)
    for line, share, limit in zip(
        columns.lines, shares.tolist(), columns.limits(shares), strict=True
    ):
        weight, activations, link, compute, untouched = line.cost
        local = weight * (1 if untouched else 1 - share) + activations
        seconds = dict(zip(LIMITS, (local, link * line.cost.touched(share), compute), strict=True))
        assert seconds[limit] == max(seconds.values())


def test_sums_are_by_graph_and_by_product() -> None:
    uses = tuple(
        OpUse(op, graph, "w", "linear", 8.0, 0.0, 0.0, 1.0)
        for graph in ("prefill", "decode")
        for op in ("gate_up", "gate_up", "down")
    )
    problem = PlanProblem((TensorSpec("w", 8, row_block=1),), uses, 0, "cpu", ring_bytes=64)
    h200, grids = load("h200"), [split_grid(problem.tensors[0])]
    lines = cost_lines(problem, h200, h200.link("cpu"))
    columns = UseColumns(problem, h200, lines, grids)
    column = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert columns.graphs == ["prefill", "decode"]
    assert columns.by_graph(column) == [7.0, 56.0]
    assert columns.by_product(column).tolist() == [3.0, 4.0, 24.0, 32.0]
    assert columns.whole.tolist() == [16.0, 8.0, 16.0, 8.0]


@pytest.mark.parametrize("ring_bytes", [0, 64 << 20])
def test_nothing_to_plan_is_a_plan(ring_bytes: int) -> None:
    plan = make_plan(PlanProblem((), (), 0, "cpu", ring_bytes=ring_bytes), load("h200"))
    assert (plan.splits, plan.ops, plan.objective) == ({}, (), 0.0)
