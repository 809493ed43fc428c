"""A placement with the faster way of reading it: by graph, directly or with copies ahead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

from dak_inductor.ahead_placement import StagedStep, copied_bytes, product_seconds, staged_steps
from dak_inductor.copy_ring import MARGIN
from dak_inductor.cost_curve import Line
from dak_inductor.cost_model import alone_seconds, peak_flops, step_bound
from dak_inductor.hardware import HardwareProfile
from dak_inductor.plan import OpPlan, Plan, PlanProblem
from dak_inductor.split_grid import SplitGrid


class Schedule:
    """`remote` bytes of each tensor, and what the step takes. Times in seconds."""

    def __init__(
        self,
        problem: PlanProblem,
        profile: HardwareProfile,
        lines: Sequence[Line],
        grids: Sequence[SplitGrid],
        remote: Sequence[int],
    ) -> None:
        self.remote = remote
        self._problem, self._profile, self._lines = problem, profile, lines
        self._link = profile.link(problem.remote)
        self._shares = [
            r / g.nbytes if g.nbytes else 0.0 for r, g in zip(remote, grids, strict=True)
        ]
        self._shares.append(0.0)  # index -1
        self._direct = [line.cost.time(self._shares[line.tensor]) + line.floor for line in lines]

    @cached_property
    def staged(self) -> dict[str, StagedStep]:
        """Graphs whose remote rows are copied ahead, since that is predicted to be faster."""
        if not self._problem.ring_bytes:
            return {}
        direct: dict[str, float] = {}
        for line, seconds, alone in zip(self._lines, self._direct, self._alone, strict=True):
            took = seconds + alone
            direct[line.use.graph] = direct.get(line.use.graph, 0.0) + took
        steps = staged_steps(
            self._lines,
            self._shares,
            self._direct,
            self._profile,
            self._link,
            self._problem.ring_bytes,
        )
        return {
            graph: step
            for graph, step in steps.items()
            if step.seconds < (1 - MARGIN) * direct[graph]
        }

    @cached_property
    def times(self) -> list[float]:
        """Of one call of each use. What a step with copies takes besides its products is theirs
        that are copied for, by their bytes."""
        if not self.staged:
            return self._direct
        times, ring_bytes = list(self._direct), self._problem.ring_bytes
        for number, line in enumerate(self._lines):
            if self._is_staged(line):
                step = self.staged[line.use.graph]
                copied = self._shares[line.tensor] * line.use.touched_bytes
                whole = self._arriving[line.use.graph, line.use.op]
                product = product_seconds(line.use, whole, ring_bytes) * (copied / whole)
                times[number] = line.alone + product + step.besides * copied / step.copied
        return times

    @cached_property
    def expected(self) -> float:
        """The objective and what products take longer in a step that read both memories themselves.
        That is no part of their convex cost, so the greedy fill does not see it."""
        return self.objective + math.fsum(
            line.use.calls * alone
            for line, alone in zip(self._lines, self._alone, strict=True)
            if not self._is_staged(line)
        )

    @cached_property
    def _arriving(self) -> dict[tuple[str, str], float]:
        return copied_bytes(self._lines, self._shares)

    @cached_property
    def _alone(self) -> list[float]:
        """Of each line: once for a product that reads two weights, with the last one that has
        remote bytes."""
        whole: dict[tuple[str, str], float] = {}
        last: dict[tuple[str, str], int] = {}
        for number, line in enumerate(self._lines):
            if line.copied:
                product = (line.use.graph, line.use.op)
                whole[product] = whole.get(product, 0.0) + line.use.touched_bytes
                if self._shares[line.tensor] > 0:
                    last[product] = number
        found = [0.0] * len(self._lines)
        for product, number in last.items():
            share, m = self._arriving[product] / whole[product], self._lines[number].use.m
            found[number] = alone_seconds(m, share, self._profile, self._link)
        return found

    @cached_property
    def objective(self) -> float:
        """Sum over uses of calls x time."""
        return math.fsum(
            line.use.calls * seconds for line, seconds in zip(self._lines, self.times, strict=True)
        )

    def plan(self, objective_bound: float) -> Plan:
        """The record. `objective_bound` is that of direct reads; copies ahead may be faster, and
        are bounded by the step."""
        times: dict[str, list[float]] = {}
        compute: dict[str, float] = {}
        ops = []
        for line, seconds in zip(self._lines, self.times, strict=True):
            use, cost, share = line.use, line.cost, self._shares[line.tensor]
            staged = self._is_staged(line)
            far = cost.touched(share) * use.touched_bytes
            ops.append(
                OpPlan(
                    use.op, use.graph, use.tensor, use.kind,
                    "staged" if staged else use.strategy, share,
                    use.touched_bytes - far + use.other_bytes, far, seconds, use.calls,
                    "link" if staged else cost.limit(share), use.module, use.source, use.m,
                )
            )  # fmt: skip
            times.setdefault(use.graph, []).append(seconds)
            if use.flops:
                alone = use.flops / peak_flops(self._profile, use.dtype)
                compute[use.graph] = compute.get(use.graph, 0.0) + alone
        problem = self._problem
        bound = step_bound(ops, compute, self._profile, self._link)
        if self.staged:
            fewest = dict.fromkeys(bound, math.inf)
            for op in ops:
                fewest[op.graph] = min(fewest[op.graph], op.calls)
            whole = math.fsum(fewest[graph] * seconds for graph, seconds in bound.items())
            objective_bound = min(objective_bound, whole)
        names = {s.name: r for s, r in zip(problem.tensors, self.remote, strict=True)}
        return Plan(
            model=problem.model,
            hardware=self._profile.name,
            remote=problem.remote,
            asked_bytes=problem.remote_bytes,
            splits=names,
            sizes={spec.name: spec.nbytes for spec in problem.tensors},
            ops=tuple(ops),
            refusals=problem.refusals,
            step_times={graph: math.fsum(values) for graph, values in times.items()},
            bound=bound,
            objective=self.objective,
            objective_bound=objective_bound,
        )

    def _is_staged(self, line: Line) -> bool:
        return line.copied and line.use.graph in self.staged and self._shares[line.tensor] > 0
