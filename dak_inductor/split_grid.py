"""Where a tensor may be split: everywhere at creation, by pages once it lives. Whole bytes."""

from __future__ import annotations

from typing import NamedTuple

from dak_inductor.errors import BudgetError, PlanError
from dak_inductor.plan import TensorSpec


class SplitGrid(NamedTuple):
    """Splits 0, `nbytes` and `first` + k * `step` of one tensor, between two remote sizes."""

    nbytes: int
    first: int
    step: int
    low: int  # fewest remote bytes, on the grid
    high: int  # most remote bytes, on the grid

    def at_least(self, remote: int) -> int:
        """The smallest remote size on the grid that is not below `remote`, `high` at most."""
        if remote <= self.low:
            return self.low
        if remote >= self.high:
            return self.high
        return _round_up(self, remote)

    def at_most(self, remote: int) -> int:
        """The largest remote size on the grid that is not above `remote`, `low` at least."""
        if remote <= self.low:
            return self.low
        if remote >= self.high:
            return self.high
        return _round_down(self, remote)


def _round_up(grid: SplitGrid, remote: int) -> int:
    split = grid.nbytes - remote
    if remote <= 0:
        return 0
    if split < grid.first or split <= 0:
        return grid.nbytes
    return remote + (split - grid.first) % grid.step


def _round_down(grid: SplitGrid, remote: int) -> int:
    split = grid.nbytes - remote
    if split <= 0:
        return grid.nbytes
    if split <= grid.first:
        return max(0, grid.nbytes - grid.first)
    return max(0, remote - (grid.first - split) % grid.step)


def split_grid(spec: TensorSpec) -> SplitGrid:
    """The grid of `spec`. Raises PlanError for sizes that make no sense, BudgetError where no split
    lies between `min_remote` and `max_remote`."""
    nbytes, smallest = spec.nbytes, spec.min_remote
    largest = nbytes if spec.max_remote is None else spec.max_remote
    step = spec.granularity if spec.page is None else spec.page
    first = 0 if spec.page is None or spec.first_page_split is None else spec.first_page_split
    if step <= 0 or nbytes < 0 or first < 0 or not 0 <= smallest <= largest <= nbytes:
        raise PlanError(
            f"tensor {spec.name!r} of {nbytes} bytes: at least {smallest} and at most {largest} "
            f"bytes remote, in steps of {step} from {first}, cannot be planned"
        )
    grid = SplitGrid(nbytes, first, step, 0, nbytes)
    if smallest:
        grid = grid._replace(low=_round_up(grid, smallest))
    if largest < nbytes:
        grid = grid._replace(high=_round_down(grid, largest))
    if grid.low > grid.high:
        raise BudgetError(
            f"tensor {spec.name!r} of {nbytes} bytes can be split in steps of {step} from {first}: "
            f"no split puts between {smallest} and {largest} bytes into the remote tier"
        )
    return grid
