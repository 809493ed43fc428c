"""What a placement takes where the link copies remote rows ahead of the products that read them.

No product starts before its copy has come. So a step takes no less than any of its copies, with all
before it, and then what runs behind the product that it is for.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dak_inductor.copy_ring import LAUNCHES_IN_RING, PARTS_IN_RING
from dak_inductor.cost_model import (
    FEW_TOKENS,
    TOKENS_OF_TILE,
    both_memories_seconds,
    copy_slowdown,
    divided_seconds,
)
from dak_inductor.lowering.copy_cost import piece_overhead
from dak_inductor.use_columns import Column, UseColumns, sums

_PARTS_SECONDS = 10e-6
"""What a product takes longer whose remote rows are copied ahead: a product and a sum over them of
their own. Measured on the H200 in a decode step of Llama-3-8B's layers."""
_LAUNCH_SECONDS = 5e-6
"""The same of few tokens: one launch, which starts when all of its rows are there, and not before
the work ahead of it has ended."""
_FURTHER_SECONDS = 5e-6
"""Of each further part: a product of its own (`op_floor`)."""
_ENDS_SECONDS = 10e-6  # of a step with copies: they start and are joined


class StagedStep(NamedTuple):
    """A graph's step with its remote bytes copied ahead. `besides` is what it takes more than its
    products one after the other, never negative: waiting for the link, and slower HBM."""

    seconds: float
    besides: float
    copied: float  # bytes


class CopiesAhead:
    """The remote rows of one placement that may be copied ahead.

    Attributes:
        uses: those that have such rows, by their number.
        copied: bytes, of `uses`.
        seconds: of one call of `uses` with copies, without what their step takes besides.
    """

    def __init__(self, columns: UseColumns, shares: Column) -> None:
        self._columns, self._shares = columns, shares
        self.uses = np.flatnonzero(columns.copied & (shares > 0))
        self.copied = shares[self.uses] * columns.touched_bytes[self.uses]
        self._product = columns.product[self.uses]
        self._arriving = sums(self.copied, self._product, columns.products)
        self._few = (columns.m[self.uses] > 0) & (columns.m[self.uses] <= FEW_TOKENS)
        self._whole = self._arriving[self._product]
        ring_bytes = columns.problem.ring_bytes
        self._is_launch = self._few & (LAUNCHES_IN_RING * self._whole <= ring_bytes)
        self.seconds = self._seconds()

    def _seconds(self) -> Column:
        """One launch reads what is copied for it where the ring holds twice as much. A product of
        two weights, such as gate and up, pays once for both."""
        in_parts = _PARTS_SECONDS + (self._parts(self._whole) - 1) * _FURTHER_SECONDS
        longer = np.where(self._is_launch, _LAUNCH_SECONDS, in_parts)
        return self._columns.alone[self.uses] + longer * (self.copied / self._whole)

    def _parts(self, nbytes: Column) -> Column:
        return np.ceil(PARTS_IN_RING * nbytes / self._columns.problem.ring_bytes)

    def _copies(self) -> Column:
        """Of each use: one for a launch, else one for each part."""
        return np.where(self._is_launch, 1.0, self._parts(self.copied))

    def read_directly(self) -> Column:
        """What each use takes longer in a step that reads both memories itself: once for a product
        that reads two weights, with the last one that has remote bytes."""
        columns, product = self._columns, self._product
        last = np.zeros(columns.products, dtype=np.intp)
        np.maximum.at(last, product, self.uses)
        share = self._arriving[product] / columns.whole[product]
        reads_both = (share < 1) & (last[product] == self.uses)
        m, few = columns.m[self.uses], both_memories_seconds(columns.profile, columns.link)
        in_place = self._arriving[product] * np.ceil(m / TOKENS_OF_TILE)
        many = np.minimum(
            divided_seconds(columns.profile), in_place / columns.link.direct_bandwidth
        )
        seconds = np.where(self._few, few, np.where(m > FEW_TOKENS, many, 0.0))
        longer = np.zeros(len(columns.lines))
        longer[self.uses[reads_both]] = seconds[reads_both]
        return longer

    def steps(self, direct: Column) -> dict[str, StagedStep]:
        """By graph that has such rows. `direct` is what each use takes that reads its bytes in
        place."""
        columns, link = self._columns, self._columns.link
        took, read = direct.copy(), columns.far(self._shares)
        took[self.uses], read[self.uses] = self.seconds, 0.0
        # The link stands still once the ring is full: what a product reads beyond that comes while
        # it runs. Over an NVLink that is most of its bytes: the ring bridges 0.2 ms there.
        own = sums(self.seconds, self._product, columns.products)
        late = (self._arriving - columns.problem.ring_bytes) / link.copy_bandwidth - own
        graphs = len(columns.graphs)
        waits = sums(np.maximum(0.0, late), columns.graph_of_product, graphs).tolist()
        copied = sums(self.copied, columns.graph[self.uses], graphs).tolist()
        busy_for = self.copied / link.copy_bandwidth
        busy_for += piece_overhead(columns.profile, link) * self._copies()
        copying = sums(busy_for, columns.graph[self.uses], graphs).tolist()
        totals = zip(
            columns.graphs, copied, copying, columns.by_graph(took), columns.by_graph(read), waits,
            self._behind_copies(took, busy_for, graphs), strict=True,
        )  # fmt: skip
        slower = copy_slowdown(columns.profile, link) - 1
        steps = {}
        for graph, nbytes, copies, alone, others, wait, behind in totals:
            if not nbytes:
                continue
            slowed = alone + slower * min(alone, copies) + wait
            busy = behind + others / link.direct_bandwidth
            seconds = max(slowed, busy) + _ENDS_SECONDS
            steps[graph] = StagedStep(seconds, seconds - alone, nbytes)
        return steps

    def _behind_copies(self, took: Column, copying: Column, graphs: int) -> list[float]:
        """By graph, the longest of: some of its copies, then all that runs behind the product that
        they are for. No product comes before its copy, and those of the next step begin with it."""
        graph = self._columns.graph
        behind = sums_behind(took, graph)[self.uses]
        here = graph[self.uses]
        arrived = sums(copying, here, graphs)[here] - sums_behind(copying, here)
        longest = np.zeros(graphs)
        np.maximum.at(longest, here, arrived + behind)
        return longest.tolist()


def sums_behind(column: Column, graph: NDArray[np.intp]) -> Column:
    """Of each use, the sum over those behind it in its graph."""
    order = np.argsort(graph, kind="stable")
    own = column[order]
    upto = np.cumsum(own)
    numbers = graph[order]
    ends = np.flatnonzero(np.diff(numbers, append=-1))
    found = np.empty_like(column)
    found[order] = upto[ends][np.searchsorted(numbers[ends], numbers)] - upto
    return found
