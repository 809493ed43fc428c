"""Placements for copies ahead: bounds of what one launch reads, and costs of a product."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dak_inductor.benchmarks.harness.planner_problems import PAGE
from dak_inductor.copy_ring import LAUNCHES_IN_RING, RING_BYTES
from dak_inductor.cost_curve import cost_lines
from dak_inductor.cost_model import alone_seconds, op_floor
from dak_inductor.hardware import load
from dak_inductor.plan import OpUse, PlanProblem, TensorSpec
from dak_inductor.planner import make_plan
from dak_inductor.schedule import Schedule
from dak_inductor.split_grid import split_grid
from dak_inductor.use_columns import UseColumns

from .test_ahead_placement import LAYERS, all_placements, decoder, staged

H200 = load("h200")


def bounded(problem: PlanProblem) -> list[int]:
    """The placement with no more to a tensor than one launch reads."""
    most = problem.ring_bytes // LAUNCHES_IN_RING
    return next(
        placed
        for placed in all_placements(problem)
        if all(
            remote <= most
            for spec, remote in zip(problem.tensors, placed, strict=True)
            if spec.name != "embed"
        )
    )


def test_the_bound_of_a_launch_holds_for_weights_that_lie_on_pages() -> None:
    """A page more and the product is in parts."""
    most = 8 * 2**20
    problem = decoder(0.03, ring=2 * most)
    splits = make_plan(problem, H200).splits
    live = tuple(
        replace(
            spec,
            current_remote=splits[spec.name],
            page=PAGE,
            first_page_split=(spec.nbytes - splits[spec.name]) % PAGE,
        )
        for spec in problem.tensors
    )
    asked = problem.remote_bytes + 50 * 2**20
    placed = bounded(replace(problem, tensors=live, remote_bytes=asked))
    assert sum(placed) >= asked
    assert max(placed[1:]) <= most


def test_row_blocks_that_are_larger_than_half_a_ring_are_not_made_eight_times_as_large() -> None:
    """Llama-3-70B's MLP, a ring of 4 MiB: 64 rows have 3.5 MiB, 8 have less than half of 1."""
    block, nbytes = 8 * 28672 * 2, 8192 * 28672 * 2
    names = [f"layers.{layer}.{name}" for name in ("down", "up") for layer in range(LAYERS)]
    specs = tuple(TensorSpec(name, nbytes, row_block=block) for name in names)
    uses = tuple(
        OpUse(name, "decode", name, "linear", nbytes, 0.0, 0.0, 1.0, m=1) for name in names
    )
    asked = 4 * block * len(names)
    placed = bounded(PlanProblem(specs, uses, asked, "cpu", ring_bytes=4 * 2**20))
    assert placed == [4 * block] * len(names)


def test_what_a_product_of_two_weights_costs_besides_its_bytes_counts_once() -> None:
    nbytes = 14336 * 4096 * 2
    specs = tuple(TensorSpec(name, nbytes, row_block=8 * 4096 * 2) for name in ("gate", "up"))
    together, apart = (
        PlanProblem(
            specs,
            tuple(
                OpUse(op or spec.name, "decode", spec.name, "linear", nbytes, 0.0, 0.0, 1.0, m=1)
                for spec in specs
            ),
            0,
            "cpu",
            ring_bytes=RING_BYTES,
        )
        for op in ("gate_up", "")
    )
    link, grids = H200.link("cpu"), [split_grid(spec) for spec in specs]
    few = 2**20  # read directly; nothing waits for copies of the others
    costs = []
    for problem, remote in ((together, few), (apart, few), (together, 16 * few), (apart, 16 * few)):
        lines = cost_lines(problem, H200, link)
        costs.append(Schedule(UseColumns(problem, H200, lines, grids), [remote, remote]))
    assert not costs[0].staged and not costs[1].staged
    one = alone_seconds(1, 0.01, H200, link)
    kernel = op_floor("linear", H200)
    assert costs[1].expected - costs[0].expected == pytest.approx(one + kernel)
    assert costs[2].staged and costs[3].staged
    for schedule in costs[2:]:
        assert schedule.objective == pytest.approx(schedule.staged["decode"].seconds)


@pytest.mark.parametrize("share", [0.15, 0.3])
def test_few_products_read_both_memories_also_where_nothing_is_copied(share: float) -> None:
    """OPT's matrices over NVLink with a ring of 4 MiB: all of them at their balance take 1.2 times
    as long."""
    specs, uses = [], []
    for layer in range(24):
        for name, (out, width) in {
            **dict.fromkeys(("q", "k", "v", "o"), (2048, 2048)),
            "fc1": (8192, 2048),
            "fc2": (2048, 8192),
        }.items():
            tensor, nbytes = f"layers.{layer}.{name}", out * width * 2
            specs.append(TensorSpec(tensor, nbytes, row_block=8 * width * 2))
            uses.append(OpUse(tensor, "decode", tensor, "linear", nbytes, 0.0, 0.0, 1.0, m=1))
    asked = round(share * sum(spec.nbytes for spec in specs))
    problem = PlanProblem(tuple(specs), tuple(uses), asked, "peer", ring_bytes=4 * 2**20)
    plan = make_plan(problem, H200)
    greedy = make_plan(replace(problem, ring_bytes=0), H200)
    assert not staged(plan)
    mixed, all_mixed = (sum(0 < op.remote_share < 1 for op in each.ops) for each in (plan, greedy))
    assert mixed <= 24 and all_mixed > 5 * 24
