"""Which bytes go remote: the greedy planner for operators that read remote bytes directly.

The weighted time of all uses of a tensor is convex and piecewise linear in its remote bytes, and
the tensors share one constraint only, how many bytes are remote in all. Taking the pieces of all
tensors in order of seconds per byte is then optimal: it is the optimum of the linear program, which
is the plan's `objective_bound`. Rounding to splits that memory can have comes after it.
Pure: no GPU, no tensor, the same plan for the same problem in any order.
"""

from __future__ import annotations

import math
import re

from dak_inductor.cost_curve import Line, cost_lines, cost_pieces, objective
from dak_inductor.cost_model import step_bound
from dak_inductor.errors import BudgetError, PlanError
from dak_inductor.greedy import fill, round_splits, steepest_slope
from dak_inductor.hardware import HardwareProfile, LinkProfile
from dak_inductor.plan import OpPlan, Plan, PlanProblem
from dak_inductor.split_grid import SplitGrid, split_grid


def make_plan(
    problem: PlanProblem, profile: HardwareProfile, *, move_tolerance: float = 1e-3
) -> Plan:
    """The plan with the least sum of calls x time that makes `remote_bytes` remote.

    A tensor with `current_remote` stays where it is unless moving it pays: a byte is moved back to
    the GPU only for more than `move_tolerance` of the steepest slope, and the whole placement is
    kept where a new one would gain no more than that share of the objective. Raises BudgetError
    where fewer bytes than `remote_bytes` may leave the GPU, PlanError for an ill-formed problem,
    ProfileError where the profile has no link to `remote`.
    """
    link = profile.link(problem.remote)
    grids = [split_grid(spec) for spec in problem.tensors]
    _check(problem, grids)
    lines = cost_lines(problem, profile, link)
    pieces = cost_pieces(lines, problem, grids)
    rank = _rank(problem)
    asked = max(problem.remote_bytes, sum(grid.low for grid in grids))

    relaxed = fill(pieces, grids, asked, rank, [0] * len(grids), 0.0)
    objective_bound = objective(lines, relaxed.remote, grids)
    if any(spec.current_remote is not None for spec in problem.tensors):
        current = [spec.current_remote or 0 for spec in problem.tensors]
        price = move_tolerance * steepest_slope(pieces)
        priced = fill(pieces, grids, asked, rank, current, price)
        remote = round_splits(priced, pieces, grids, current, asked)
        remote = _keep(remote, problem, grids, lines, asked, move_tolerance)
    else:
        remote = round_splits(relaxed, pieces, grids, [0] * len(grids), asked)
    return _record(problem, profile, link, lines, grids, remote, objective_bound)


def _check(problem: PlanProblem, grids: list[SplitGrid]) -> None:
    if problem.remote_bytes < 0:
        raise PlanError(f"{problem.remote_bytes} bytes cannot be remote")
    if len({spec.name for spec in problem.tensors}) != len(grids):
        raise PlanError("two tensors of one name cannot be planned")
    possible = sum(grid.high for grid in grids)
    if possible < problem.remote_bytes:
        total = sum(grid.nbytes for grid in grids)
        pinned = sum(grid.high < grid.nbytes for grid in grids)
        raise BudgetError(
            f"{problem.remote_bytes:,} bytes have to leave the GPU, but only {possible:,} of the "
            f"{total:,} bytes planned may ({pinned} of {len(grids)} tensors are held back): raise "
            f"gpu_memory by {problem.remote_bytes - possible:,} bytes, or let more tensors leave"
        )


def _rank(problem: PlanProblem) -> list[int]:
    """Place of each tensor among equals: the largest first, so that few are split, and those of one
    size from all over the model.

    Between remote bytes that lie together and the next ones the link works ahead only as far as its
    ring holds: of 8 equal layers that run in 1 ms, 2 neighbours leave it idle for half of that.
    """
    tensors = problem.tensors
    by_size: dict[int, list[int]] = {}
    for index in sorted(range(len(tensors)), key=lambda i: _natural(tensors[i].name)):
        by_size.setdefault(tensors[index].nbytes, []).append(index)
    order = [
        equal[place]
        for _, equal in sorted(by_size.items(), reverse=True)
        for place in _spread(len(equal))
    ]
    rank = [0] * len(tensors)
    for place, index in enumerate(order):
        rank[index] = place
    return rank


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """Sorts layer 2 ahead of layer 10."""
    parts = re.split(r"(\d+)", name)
    return tuple((int(part) if part.isdecimal() else -1, part) for part in parts)


def _spread(count: int) -> list[int]:
    """0 to count - 1 in an order of which every beginning is spread over the whole: by their bits
    from the last to the first."""
    width = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda number: int(f"{number:0{width}b}"[::-1], 2))


def _keep(
    remote: list[int],
    problem: PlanProblem,
    grids: list[SplitGrid],
    lines: list[Line],
    asked: int,
    tolerance: float,
) -> list[int]:
    """`remote`, or the current placement where it is allowed and nearly as good."""
    current = []
    for spec, grid in zip(problem.tensors, grids, strict=True):
        there = spec.current_remote
        if there is None or not grid.low <= there <= grid.high:
            return remote
        current.append(there)
    if sum(current) < asked:
        return remote
    now, then = objective(lines, current, grids), objective(lines, remote, grids)
    return current if now <= then * (1 + tolerance) else remote


def _record(
    problem: PlanProblem,
    profile: HardwareProfile,
    link: LinkProfile,
    lines: list[Line],
    grids: list[SplitGrid],
    remote: list[int],
    objective_bound: float,
) -> Plan:
    shares = [r / g.nbytes if g.nbytes else 0.0 for r, g in zip(remote, grids, strict=True)]
    shares.append(0.0)  # index -1
    times: dict[str, list[float]] = {}
    compute: dict[str, float] = {}
    ops = []
    for use, cost, _, _, tensor, floor in lines:
        share = shares[tensor]
        time = cost.time(share) + floor
        far = cost.touched(share) * use.touched_bytes
        ops.append(
            OpPlan(
                use.op, use.graph, use.tensor, use.kind, use.strategy, share,
                use.touched_bytes - far + use.other_bytes, far, time, use.calls,
                cost.limit(share), use.module, use.source, use.m,
            )
        )  # fmt: skip
        times.setdefault(use.graph, []).append(time)
        compute[use.graph] = compute.get(use.graph, 0.0) + cost.compute
    names: dict[str, int] = {s.name: r for s, r in zip(problem.tensors, remote, strict=True)}
    return Plan(
        model=problem.model,
        hardware=profile.name,
        remote=problem.remote,
        asked_bytes=problem.remote_bytes,
        splits=names,
        sizes={spec.name: spec.nbytes for spec in problem.tensors},
        ops=tuple(ops),
        refusals=problem.refusals,
        step_times={graph: math.fsum(values) for graph, values in times.items()},
        bound=step_bound(ops, compute, profile, link),
        objective=math.fsum(op.calls * op.time for op in ops),
        objective_bound=objective_bound,
    )
