"""A placement with the faster way of reading it: by graph, directly or with copies ahead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dak_inductor.copies_ahead import CopiesAhead, StagedStep
from dak_inductor.copy_ring import MARGIN
from dak_inductor.cost_model import PRODUCTS, step_bound
from dak_inductor.plan import OpPlan, Plan
from dak_inductor.use_columns import Column, UseColumns


class Schedule:
    """`remote` bytes of each tensor, and what the step takes. Times in seconds."""

    def __init__(self, columns: UseColumns, remote: Sequence[int]) -> None:
        self.remote = remote
        self._columns = columns
        self._shares = columns.shares(remote)
        self._direct = columns.direct(self._shares)

    @cached_property
    def _ahead(self) -> CopiesAhead:
        return CopiesAhead(self._columns, self._shares)

    @cached_property
    def _read_directly(self) -> Column:
        """What each use takes longer in a step that reads both memories itself."""
        return self._ahead.read_directly()

    @cached_property
    def staged(self) -> dict[str, StagedStep]:
        """Graphs whose remote rows are copied ahead, since that is predicted to be faster."""
        if not self._columns.problem.ring_bytes:
            return {}
        sums = self._columns.by_graph(self._direct + self._read_directly)
        direct = dict(zip(self._columns.graphs, sums, strict=True))
        return {
            graph: step
            for graph, step in self._ahead.steps(self._direct).items()
            if step.seconds < (1 - MARGIN) * direct[graph]
        }

    @cached_property
    def _is_staged(self) -> NDArray[np.bool_]:
        """Of each use: whether its remote rows come ahead of it."""
        in_staged = np.array([graph in self.staged for graph in self._columns.graphs], dtype=bool)
        found = np.zeros(len(self._columns.lines), dtype=bool)
        uses = self._ahead.uses
        found[uses] = in_staged[self._columns.graph[uses]]
        return found

    @cached_property
    def _remote_bytes(self) -> Column:
        return self._columns.far(self._shares)

    @cached_property
    def _local_bytes(self) -> Column:
        columns = self._columns
        return columns.touched_bytes - self._remote_bytes + columns.other_bytes

    @cached_property
    def times(self) -> Column:
        """Of one call of each use. What a step with copies takes besides its products is theirs
        that are copied for, by their bytes."""
        times, ahead, graph = self._direct.copy(), self._ahead, self._columns.graph
        for name, step in self.staged.items():
            own = graph[ahead.uses] == self._columns.graphs.index(name)
            besides = step.besides * ahead.copied[own] / step.copied
            times[ahead.uses[own]] = ahead.seconds[own] + besides
        return times

    @cached_property
    def expected(self) -> float:
        """The objective and what products take longer in a step that read both memories themselves.
        That is no part of their convex cost, so the greedy fill does not see it."""
        return self.objective + math.fsum((self._columns.calls * self._longer).tolist())

    def expected_by_graph(self) -> tuple[list[float], list[float]]:
        """The same, of each graph's products and of its other uses."""
        columns = self._columns
        seconds = columns.calls * (self.times + self._longer)
        products = np.array([line.use.kind in PRODUCTS for line in columns.lines], dtype=bool)
        of_products = columns.by_graph(np.where(products, seconds, 0.0))
        return of_products, columns.by_graph(np.where(products, 0.0, seconds))

    @property
    def _longer(self) -> Column:
        return np.where(self._is_staged, 0.0, self._read_directly)

    @cached_property
    def objective(self) -> float:
        """Sum over uses of calls x time."""
        return math.fsum((self._columns.calls * self.times).tolist())

    def plan(self, objective_bound: float) -> Plan:
        """The record. `objective_bound` is that of direct reads; copies ahead may be faster, and
        are bounded by the step."""
        columns, profile, problem = self._columns, self._columns.profile, self._columns.problem
        sums = zip(
            columns.graphs,
            columns.by_graph(np.where(columns.fused, 0.0, self._local_bytes)),
            columns.by_graph(self._remote_bytes),
            columns.by_graph(columns.peak_seconds()),
            strict=True,
        )
        bound = {
            graph: step_bound(local, remote, compute, profile, columns.link)
            for graph, local, remote, compute in sums
        }
        if self.staged:
            fewest = np.full(len(columns.graphs), math.inf)
            np.minimum.at(fewest, columns.graph, columns.calls)
            steps = zip(fewest.tolist(), bound.values(), strict=True)
            whole = math.fsum(calls * seconds for calls, seconds in steps)
            objective_bound = min(objective_bound, whole)
        ops = self._ops()
        times: dict[str, list[float]] = {graph: [] for graph in columns.graphs}
        for op in ops:
            times[op.graph].append(op.time)
        names = {s.name: r for s, r in zip(problem.tensors, self.remote, strict=True)}
        return Plan(
            model=problem.model,
            hardware=profile.name,
            remote=problem.remote,
            asked_bytes=problem.remote_bytes,
            splits=names,
            sizes={spec.name: spec.nbytes for spec in problem.tensors},
            ops=ops,
            refusals=problem.refusals,
            step_times={graph: math.fsum(values) for graph, values in times.items()},
            bound=bound,
            objective=self.objective,
            objective_bound=objective_bound,
        )

    def _ops(self) -> tuple[OpPlan, ...]:
        columns, shares = self._columns, self._shares
        rows = zip(
            columns.problem.uses, self._is_staged.tolist(), columns.limits(shares),
            shares.tolist(), self._local_bytes.tolist(), self._remote_bytes.tolist(),
            self.times.tolist(),
            strict=True,
        )  # fmt: skip
        return tuple(
            [
                OpPlan(
                    use.op, use.graph, use.tensor, use.kind,
                    "staged" if staged else use.strategy, share, local, far, seconds, use.calls,
                    "link" if staged else limit, use.module, use.source, use.m,
                )
                for use, staged, limit, share, local, far, seconds in rows
            ]
        )  # fmt: skip
