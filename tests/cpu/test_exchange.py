"""Splits on pages are bettered after they were rounded one by one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dak_inductor.cost_curve import Piece
from dak_inductor.exchange import Exchange
from dak_inductor.hardware import load
from dak_inductor.plan import OpUse, PlanProblem, TensorSpec
from dak_inductor.planner import make_plan
from dak_inductor.split_grid import SplitGrid

H200 = load("h200")
MIB = 2**20
PAGE = 2 * MIB


def curve(tensor: int, size: int, free: int) -> list[Piece]:
    """As of a weight: the first `free` bytes save time, each further one costs."""
    return [Piece(-0.1, 0.0, float(free), tensor), Piece(1.0, float(free), float(size), tensor)]


def cost(pieces: list[list[Piece]], remote: list[int]) -> float:
    return sum(
        piece.slope * max(0.0, min(there, piece.stop) - piece.start)
        for own, there in zip(pieces, remote, strict=True)
        for piece in own
    )


@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(0, 300)), min_size=1, max_size=12),
    st.data(),
)
@settings(max_examples=200, deadline=None)
def test_nothing_gets_dearer_and_no_less_than_asked_is_remote(
    tensors: list[tuple[int, int]], data: st.DataObject
) -> None:
    page = 100
    sizes = [pages * page for pages, _ in tensors]
    pieces = [
        curve(number, size, min(free, size))
        for number, (size, (_, free)) in enumerate(zip(sizes, tensors, strict=True))
    ]
    grids = [SplitGrid(size, 0, page, 0, size) for size in sizes]
    before = [page * data.draw(st.integers(0, size // page)) for size in sizes]
    asked = data.draw(st.integers(0, sum(before)))
    rank = list(range(len(sizes)))
    after = Exchange(before, pieces, grids, asked, rank, 0.0).run()
    assert asked <= sum(after) <= sum(before)
    assert all(
        split % page == 0 and 0 <= split <= size for split, size in zip(after, sizes, strict=True)
    )
    assert cost(pieces, after) <= cost(pieces, before) + 1e-9
    for tensor, there in enumerate(after):  # all pages are alike: no single step or swap is left
        if there and sum(after) - page >= asked:
            fewer = [*after[:tensor], there - page, *after[tensor + 1 :]]
            assert cost(pieces, fewer) >= cost(pieces, after) - 1e-9


def test_a_move_that_saves_less_than_it_costs_is_not_made() -> None:
    pieces = [[Piece(1.0, 0.0, 400.0, 0)], [Piece(0.9, 0.0, 400.0, 1)]]
    grids = [SplitGrid(400, 0, 100, 0, 400)] * 2
    assert Exchange([400, 0], pieces, grids, 400, [0, 1], 0.0).run() == [0, 400]
    assert Exchange([400, 0], pieces, grids, 400, [0, 1], 0.06).run() == [400, 0]


@pytest.mark.parametrize("share", [0.008, 0.015])
def test_weights_placed_for_copies_ahead_are_spread_for_direct_reads(share: float) -> None:
    """Each may have 1.1% remote for nothing, which is less than a page."""
    sizes = [112 * MIB] * 8 + [8 * MIB] * 8
    asked = int(share * sum(sizes))
    specs = tuple(
        TensorSpec(f"t{i}", size, page=PAGE, current_remote=16 * MIB if i == 0 else 0)
        for i, size in enumerate(sizes)
    )
    uses = tuple(
        OpUse(s.name, "decode", s.name, "linear", s.nbytes, 1e5, 1e8, 16.0, m=1) for s in specs
    )
    plan = make_plan(PlanProblem(specs, uses, asked, "cpu"), H200)
    assert asked <= plan.remote_bytes < asked + PAGE
    held = [plan.splits[spec.name] for spec in specs]
    assert max(held) <= 2 * PAGE and not any(held[8:]), "of large weights pages cost least"
