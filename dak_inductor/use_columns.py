"""The uses of a problem by column, from which one placement after another is priced."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dak_inductor.cost_curve import Line
from dak_inductor.cost_model import FUSED, peak_flops
from dak_inductor.hardware_profile import HardwareProfile
from dak_inductor.plan import PlanProblem
from dak_inductor.split_grid import SplitGrid

LIMITS = ("hbm", "link", "compute")
Column = NDArray[np.float64]
_Key = TypeVar("_Key", bound=Hashable)


class UseColumns:
    """Each column has one number for each of `lines`, in their order.

    With copies ahead up to four placements are priced. Three of 2,000 uses took 23 ms use by use,
    and take 5 by column.

    Attributes:
        graph: number of the graph, in `graphs`.
        tensor: its number, -1 where the use reads none of ours.
        copied: whether the link may copy its remote rows ahead.
        fused: whether it is a kernel that Inductor makes; its bytes are no bound of the step, which
            another compiler may move less often.
        alone: seconds of one call with nothing remote.
        product: number of the operator, below `products`: gate and up are two uses of one.
        graph_of_product: number of the graph, by product.
        whole: by product, the bytes of its weights that the link may copy ahead.
    """

    def __init__(
        self,
        problem: PlanProblem,
        profile: HardwareProfile,
        lines: Sequence[Line],
        grids: Sequence[SplitGrid],
    ) -> None:
        self.problem, self.profile, self.lines = problem, profile, lines
        self.link = profile.link(problem.remote)
        self._sizes = [grid.nbytes for grid in grids]
        self._weight, self._activations, self._link, self._compute, self._untouched = _columns(
            [line.cost for line in lines], 5
        )
        self.tensor = np.array([line.tensor for line in lines], dtype=np.intp)
        self.copied = np.array([line.copied for line in lines], dtype=bool)
        self.fused = np.array([line.use.kind == FUSED for line in lines], dtype=bool)
        self._floor = np.array([line.floor for line in lines], dtype=np.float64)
        self.alone = self.direct(np.zeros(len(lines)))
        uses = [line.use for line in lines]
        self.calls, self.touched_bytes, self.other_bytes, self.flops, self.m = _columns(
            [(u.calls, u.touched_bytes, u.other_bytes, u.flops, u.m) for u in uses], 5
        )
        self.graphs, self.graph = _numbered([use.graph for use in uses])
        products, self.product = _numbered([(use.graph, use.op) for use in uses])
        self.products = len(products)
        self.graph_of_product = np.zeros(self.products, dtype=np.intp)
        self.graph_of_product[self.product] = self.graph
        self.whole = self.by_product(np.where(self.copied, self.touched_bytes, 0.0))

    def shares(self, remote: Sequence[float]) -> Column:
        """What is remote of each use's tensor, 0 to 1, with `remote` bytes of each tensor."""
        shares = [r / size if size else 0.0 for r, size in zip(remote, self._sizes, strict=True)]
        return np.array([*shares, 0.0])[self.tensor]  # index -1: reads none of ours

    def direct(self, shares: Column) -> Column:
        """Seconds of one call that reads its remote bytes in place: `OpCost.time` and the floor."""
        far = self._link * self._touched(shares)
        return np.maximum(np.maximum(self._local(shares), far), self._compute) + self._floor

    def objective(self, remote: Sequence[float]) -> float:
        """Seconds of all calls that read `remote` bytes of each tensor in place."""
        return math.fsum((self.calls * self.direct(self.shares(remote))).tolist())

    def limits(self, shares: Column) -> list[str]:
        """The one of LIMITS that sets the time of each; HBM where two are equal."""
        local, far = self._local(shares), self._link * self._touched(shares)
        is_hbm = (local >= far) & (local >= self._compute)
        limits = np.where(is_hbm, 0, np.where(far >= self._compute, 1, 2))
        return [LIMITS[limit] for limit in limits.tolist()]

    def far(self, shares: Column) -> Column:
        """Remote bytes that one call touches."""
        return self._touched(shares) * self.touched_bytes

    def peak_seconds(self) -> Column:
        """Of one call, at the profile's matmul rate."""
        dtypes, dtype = _numbered([line.use.dtype for line in self.lines])
        rates = np.array([peak_flops(self.profile, name) for name in dtypes])
        return self.flops / rates[dtype]

    def by_graph(self, column: Column) -> list[float]:
        """The sum over each graph's uses."""
        return sums(column, self.graph, len(self.graphs)).tolist()

    def by_product(self, column: Column) -> Column:
        """The sum over each product's uses."""
        return sums(column, self.product, self.products)

    def _touched(self, shares: Column) -> Column:
        return np.maximum(0.0, shares - self._untouched) / (1 - self._untouched)

    def _local(self, shares: Column) -> Column:
        left = np.where(self._untouched, 1.0, 1 - shares)
        return self._weight * left + self._activations


def sums(column: Column, numbers: NDArray[np.intp], count: int) -> Column:
    """By number, of the entries that have it, added in their order."""
    return np.bincount(numbers, column, count).astype(np.float64, copy=False)


def _columns(rows: Sequence[Sequence[float]], count: int) -> Column:
    return np.array(rows, dtype=np.float64).reshape(-1, count).T.copy()


def _numbered(keys: Sequence[_Key]) -> tuple[list[_Key], NDArray[np.intp]]:
    """The keys that differ, in the order in which they come first, and each one's number there."""
    numbers: dict[_Key, int] = {}
    found = [numbers.setdefault(key, len(numbers)) for key in keys]
    return list(numbers), np.array(found, dtype=np.intp)
