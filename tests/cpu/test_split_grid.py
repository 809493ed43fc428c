"""Where a tensor may be split, and rounding to there."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dak_inductor.errors import BudgetError, PlanError
from dak_inductor.plan import TensorSpec
from dak_inductor.split_grid import split_grid


def allowed_remotes(spec: TensorSpec) -> list[int]:
    """Every remote size that the docstring of TensorSpec allows, by enumeration."""
    step = spec.page or spec.granularity
    first = (spec.first_page_split or 0) if spec.page else 0
    splits = {0, spec.nbytes, *range(first, spec.nbytes, step)}
    most = spec.nbytes if spec.max_remote is None else spec.max_remote
    return sorted(spec.nbytes - s for s in splits if spec.min_remote <= spec.nbytes - s <= most)


@st.composite
def specs(draw: st.DrawFn) -> TensorSpec:
    nbytes = draw(st.integers(0, 3000))
    low = draw(st.integers(0, nbytes))
    high = draw(st.none() | st.integers(low, nbytes))
    page = draw(st.none() | st.integers(1, 1000))
    first = draw(st.none() | st.integers(0, page - 1)) if page else None
    granularity = draw(st.integers(1, 500))
    return TensorSpec(
        "t", nbytes, min_remote=low, max_remote=high, granularity=granularity, page=page,
        first_page_split=first,
    )  # fmt: skip


@given(specs(), st.integers(0, 3000))
def test_rounding_finds_the_neighbours_on_the_grid(spec: TensorSpec, remote: int) -> None:
    allowed = allowed_remotes(spec)
    assume(allowed)
    grid = split_grid(spec)
    assert grid.at_least(remote) == next((r for r in allowed if r >= remote), allowed[-1])
    assert grid.at_most(remote) == next((r for r in reversed(allowed) if r <= remote), allowed[0])
    assert (grid.low, grid.high) == (allowed[0], allowed[-1])


@given(specs())
def test_no_split_between_the_limits_is_refused(spec: TensorSpec) -> None:
    assume(not allowed_remotes(spec))
    with pytest.raises(BudgetError, match="no split"):
        split_grid(spec)


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec("t", 100, min_remote=60, max_remote=50),
        TensorSpec("t", 100, max_remote=101),
        TensorSpec("t", 100, min_remote=-1),
        TensorSpec("t", -1),
        TensorSpec("t", 100, granularity=0),
        TensorSpec("t", 100, page=0),
        TensorSpec("t", 100, page=10, first_page_split=-1),
    ],
)
def test_impossible_sizes_are_refused(spec: TensorSpec) -> None:
    with pytest.raises(PlanError, match="'t'"):
        split_grid(spec)
