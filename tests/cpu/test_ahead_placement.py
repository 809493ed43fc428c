"""Placements for copies ahead: equal parts all over the model, and only where they are faster."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dak_inductor.ahead_placement import placements
from dak_inductor.benchmarks.harness.planner_problems import PAGE, on_the_grid, random_problem
from dak_inductor.copies_ahead import CopiesAhead, sums_behind
from dak_inductor.copy_ring import RING_BYTES
from dak_inductor.cost_curve import cost_lines, cost_pieces
from dak_inductor.cost_model import alone_seconds, both_seconds
from dak_inductor.hardware import load
from dak_inductor.plan import OpUse, Plan, PlanProblem, TensorSpec
from dak_inductor.planner import make_plan, seconds_by_graph
from dak_inductor.split_grid import split_grid
from dak_inductor.use_columns import UseColumns

H200 = load("h200")
SIZES = {
    "q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096),
    "gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336),
}  # fmt: skip
LAYERS = 8


def decoder(share: float, *, ring: int = RING_BYTES, remote: str = "cpu") -> PlanProblem:
    """Layers of Llama-3-8B with an embedding, of which a step reads one row."""
    specs = [TensorSpec("embed", 128256 * 4096 * 2, row_block=8 * 4096 * 2)]
    uses = [OpUse("embed", "decode", "embed", "embedding", 8192.0, 8192.0, 0.0, 16.0, m=1)]
    for layer in range(LAYERS):
        for name, (out, width) in SIZES.items():
            tensor = f"layers.{layer}.{name}"
            nbytes = out * width * 2
            op = f"layers.{layer}.gate_up" if name in ("gate", "up") else tensor
            specs.append(TensorSpec(tensor, nbytes, row_block=8 * width * 2))
            uses.append(
                OpUse(op, "decode", tensor, "linear", nbytes, 2.0 * (out + width),
                      2.0 * out * width, 16.0, m=1)
            )  # fmt: skip
    weights = sum(spec.nbytes for spec in specs[1:])
    asked = specs[0].nbytes + round(share * weights)
    return PlanProblem(tuple(specs), tuple(uses), asked, remote, ring_bytes=ring)


def all_placements(problem: PlanProblem) -> list[list[int]]:
    """All that copies ahead may have."""
    link, grids = H200.link(problem.remote), [split_grid(spec) for spec in problem.tensors]
    lines = cost_lines(problem, H200, link)
    columns = UseColumns(problem, H200, lines, grids)
    pieces = cost_pieces(lines, problem, grids)
    return [
        each for alike in placements(columns, pieces, grids, problem.remote_bytes) for each in alike
    ]


def staged(plan: Plan) -> dict[str, float]:
    return {op.tensor: op.remote_share for op in plan.ops if op.strategy == "staged"}


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2])
def test_deep_in_the_links_region_one_matrix_of_every_layer_is_remote_in_equal_parts(
    share: float,
) -> None:
    problem = decoder(share)
    plan = make_plan(problem, H200)
    assert set(staged(plan)) == {f"layers.{layer}.down" for layer in range(LAYERS)}
    parts = [plan.splits[name] for name in staged(plan)]
    block = 64 * 14336 * 2
    assert max(parts) - min(parts) <= 2 * block
    assert sum(part % block > 0 for part in parts) <= 1  # the last takes what is left
    assert plan.splits["embed"] == plan.sizes["embed"]  # read least, so it goes first
    assert problem.remote_bytes <= plan.remote_bytes < problem.remote_bytes + 256


def test_more_matrices_of_a_layer_have_to_save_more_than_predictions_may_be_off() -> None:
    """Without a graph gate and up are two products; with 32 MiB each, one launch, they and two more
    matrices would save 0.2% of a step whose remote bytes all fit into the last matrix."""
    joint = decoder(0.25)
    uses = tuple(replace(use, op=use.tensor) for use in joint.uses)
    plan = make_plan(replace(joint, uses=uses), H200)
    assert {name.rpartition(".")[2] for name in staged(plan)} == {"down"}


@pytest.mark.parametrize("share", [0.0, 0.0005])
def test_hardly_any_remote_bytes_are_read_directly(share: float) -> None:
    assert not staged(make_plan(decoder(share), H200))


@pytest.mark.parametrize("remote", ["cpu", "peer"])
@pytest.mark.parametrize("share", [-0.02, 0.0, 0.0005])
def test_products_are_left_alone_while_the_embedding_has_bytes_to_give(
    share: float, remote: str
) -> None:
    """Each at its balance they would gain 1% (8 over NVLink), and lose 26 by two memories."""
    plan = make_plan(decoder(share, remote=remote), H200)
    assert sum(op.remote_share > 0 for op in plan.ops if op.kind == "linear") == (share > 0)
    greedy = make_plan(decoder(share, ring=0, remote=remote), H200)
    assert sum(op.remote_share > 0 for op in greedy.ops) > 6 * LAYERS


@pytest.mark.parametrize(("share", "products"), [(0.005, 1), (0.01, 2), (0.02, 3), (0.03, 4)])
def test_few_remote_bytes_lie_in_few_products(share: float, products: int) -> None:
    """Read directly by half of all products, each near its balance, they took 60 us of 1.3 ms."""
    plan = make_plan(decoder(share), H200)
    assert len(staged(plan)) == products
    direct = make_plan(decoder(share, ring=0), H200)
    assert sum(0 < op.remote_share < 1 for op in direct.ops) > 5 * products
    otherwise = plan.objective > direct.objective
    assert otherwise == (share < 0.02), "sums of convex costs say otherwise, but at the balance"


@pytest.mark.parametrize("mebibytes", [32, 64])
@pytest.mark.parametrize("share", [0.03, 0.075, 0.12])
def test_over_a_fast_link_products_have_what_one_launch_reads(share: float, mebibytes: int) -> None:
    """Of one matrix of every layer, then of another: in parts each would pay more than half as much
    again. The link is no bound there."""
    ring = mebibytes * 2**20
    whole = decoder(share, ring=ring, remote="peer")
    asked = whole.remote_bytes - whole.tensors[0].nbytes
    problem = replace(whole, tensors=whole.tensors[1:], uses=whole.uses[1:], remote_bytes=asked)
    plan = make_plan(problem, H200)
    copied = [plan.splits[name] for name in staged(plan)]
    assert len(copied) == math.ceil(asked / (ring // 2 // (8 * 14336 * 2) * (8 * 14336 * 2)))
    assert max(copied) <= ring // 2
    greedy = make_plan(replace(problem, ring_bytes=0), H200)
    assert sum(0 < op.remote_share < 1 for op in greedy.ops) > len(copied)


def test_what_the_ring_does_not_hold_is_waited_for() -> None:
    """The link works ahead of a product by a ring and no further."""
    link, nbytes = H200.link("peer"), 12 * RING_BYTES
    use = OpUse("one", "decode", "one", "linear", nbytes, 0.0, 0.0, 1.0, m=1)
    other = OpUse("other", "decode", "other", "linear", nbytes, 0.0, 0.0, 9.0, m=1)
    specs = tuple(TensorSpec(name, nbytes, row_block=1024) for name in ("one", "other"))
    problem = PlanProblem(specs, (use, other), 0, "peer", ring_bytes=RING_BYTES)
    grids = [split_grid(spec) for spec in specs]
    columns = UseColumns(problem, H200, cost_lines(problem, H200, link), grids)
    alone = columns.alone.tolist()

    def seconds(share: float) -> float:
        copies = CopiesAhead(columns, np.array([share, 0.0]))
        return copies.steps(np.array([0.0, alone[1]]))["decode"].seconds

    rings = [seconds(number / 12) for number in (1, 6, 9)]
    assert rings[0] < sum(alone) + 60e-6, "all of it is hidden"
    assert rings[2] - rings[1] > 2.9 * RING_BYTES / link.copy_bandwidth


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 1.0])
def test_a_staged_step_is_predicted_between_its_bound_and_direct_reads(share: float) -> None:
    plan = make_plan(decoder(share), H200)
    direct = make_plan(decoder(share, ring=0), H200)
    assert plan.bound["decode"] <= plan.step_times["decode"] < 0.97 * direct.step_times["decode"]
    assert plan.objective_bound <= plan.objective < direct.objective
    assert plan.step_times["decode"] == pytest.approx(sum(op.time for op in plan.ops))
    assert plan.objective == pytest.approx(sum(op.calls * op.time for op in plan.ops))
    (decode,) = seconds_by_graph(decoder(share), plan.splits, H200).values()
    assert decode.products + decode.others == pytest.approx(plan.objective)
    assert decode.others < 2e-3 * decode.products, "the embedding"


def test_when_a_matrix_of_every_layer_is_whole_the_next_one_follows() -> None:
    plan = make_plan(decoder(0.4), H200)
    shares = staged(plan)
    assert all(shares[f"layers.{layer}.down"] == 1.0 for layer in range(LAYERS))
    assert 0 < shares["layers.0.gate"] < 1
    assert "layers.0.up" not in shares


def test_products_of_one_size_in_a_block_do_not_share_its_remote_bytes() -> None:
    """OPT's fc1 and fc2 have as many bytes: each product copied for would pay for it once more.
    Those of fc2 are chosen, since behind the last of them the link stands still."""
    nbytes, specs, uses = 4096 * 16384 * 2, [], []
    for layer in range(LAYERS):
        for name in ("fc1", "fc2"):
            tensor = f"decoder.layers.{layer}.{name}.weight"
            specs.append(TensorSpec(tensor, nbytes, row_block=8 * 4096 * 2))
            uses.append(OpUse(tensor, "decode", tensor, "linear", nbytes, 4e4, nbytes, 16.0, m=1))
    asked = LAYERS * nbytes // 5
    plan = make_plan(
        PlanProblem(tuple(specs), tuple(uses), asked, "cpu", ring_bytes=RING_BYTES), H200
    )
    assert set(staged(plan)) == {f"decoder.layers.{layer}.fc2.weight" for layer in range(LAYERS)}


@pytest.mark.parametrize(
    ("mebibytes", "layers"),
    [
        (39, [(1, 3, 5, 7), (3, 7)]),
        (24, [(2, 5, 7), (7,)]),
        (20, [(3, 7), (7,)]),
        (12, [(7,)]),
        (160, [tuple(range(LAYERS))]),  # each has more than in half as many would be too few
    ],
)
def test_few_bytes_lie_in_every_second_third_or_fourth_layer(
    mebibytes: int, layers: list[tuple[int, ...]]
) -> None:
    """Each product with copies pays for them, so it has 8, 16 or 32 MiB where there are as many."""
    problem = decoder(0.02)
    problem = replace(problem, remote_bytes=problem.tensors[0].nbytes + mebibytes * 2**20)
    names = [spec.name for spec in problem.tensors]
    found = []
    for placed in all_placements(problem):
        copied = [name for name, remote in zip(names, placed, strict=True) if remote][1:]
        found.append(tuple(int(name.split(".")[1]) for name in copied))
        assert {name.split(".")[2] for name in copied} == {"down"}
        assert sum(placed) >= problem.remote_bytes
    assert found == layers


def test_products_have_time_for_the_next_copy_between_them() -> None:
    """With as many sums of bytes and of work, every copy is waited for that takes longer than what
    lies between two products."""
    problem = decoder(0.02)
    grids = [split_grid(spec) for spec in problem.tensors]
    link = H200.link("cpu")
    columns = UseColumns(problem, H200, cost_lines(problem, H200, link), grids)
    names = [spec.name for spec in problem.tensors]
    seconds = []
    for layers in ([5, 6, 7], [1, 4, 7], [0, 1, 2]):
        remote = [0] * len(names)
        for layer in layers:
            remote[names.index(f"layers.{layer}.down")] = 24 * 2**20
        copies = CopiesAhead(columns, columns.shares(remote))
        seconds.append(copies.steps(columns.alone)["decode"].seconds)
    late, even, early = seconds
    assert late == pytest.approx(even)
    per_layer = columns.by_graph(columns.alone)[0] / LAYERS
    assert early == pytest.approx(even + 5 * per_layer, rel=0.02), "no copy is under way meanwhile"


@given(st.lists(st.tuples(st.integers(0, 2), st.floats(0, 1)), max_size=12))
@settings(deadline=None)
def test_sums_of_what_lies_behind_in_a_graph(uses: list[tuple[int, float]]) -> None:
    graph = np.array([number for number, _ in uses], dtype=np.intp)
    column = np.array([seconds for _, seconds in uses], dtype=np.float64)
    expected = [
        math.fsum(seconds for number, seconds in uses[place + 1 :] if number == own)
        for place, (own, _) in enumerate(uses)
    ]
    assert sums_behind(column, graph) == pytest.approx(expected)


def test_planning_again_where_everything_lies_moves_nothing() -> None:
    problem = decoder(0.05)
    plan = make_plan(problem, H200)
    live = tuple(
        replace(
            spec,
            current_remote=plan.splits[spec.name],
            page=PAGE,
            first_page_split=(spec.nbytes - plan.splits[spec.name]) % PAGE,
        )
        for spec in problem.tensors
    )
    again = make_plan(replace(problem, tensors=live), H200)
    assert again.splits == plan.splits
    assert staged(again).keys() == staged(plan).keys()


def test_what_no_copy_can_serve_is_planned_for_direct_reads() -> None:
    problem = decoder(0.1)
    none = tuple(replace(spec, row_block=0) for spec in problem.tensors)
    plan = make_plan(replace(problem, tensors=none), H200)
    assert not staged(plan)
    assert plan.splits == make_plan(decoder(0.1, ring=0), H200).splits


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_copies_ahead_never_cost_more_nor_break_a_budget(seed: int) -> None:
    problem, profile = random_problem(seed)
    blocks = tuple(replace(spec, row_block=256 * 8) for spec in problem.tensors)
    problem = on_the_grid(replace(problem, tensors=blocks))
    direct = make_plan(problem, profile)
    plan = make_plan(replace(problem, ring_bytes=RING_BYTES), profile)
    link = profile.link(problem.remote)
    alone = sum(
        use.calls
        * (
            alone_seconds(use.m, op.remote_share, profile, link)
            + both_seconds(use, op.remote_share, profile, link)
        )
        for use, op in zip(problem.uses, direct.ops, strict=True)
    )
    assert plan.objective <= (direct.objective + alone) * (1 + 2e-3)
    assert plan.objective_bound <= plan.objective * (1 + 1e-6)  # splits are rounded
    assert plan.remote_bytes >= plan.asked_bytes
    for spec in problem.tensors:
        most = spec.nbytes if spec.max_remote is None else spec.max_remote
        assert spec.min_remote <= plan.splits[spec.name] <= most
    for graph, seconds in plan.step_times.items():
        assert plan.bound[graph] <= seconds * (1 + 1e-9)
    assert Plan.from_json(plan.to_json()) == plan
