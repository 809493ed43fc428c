"""The weighted time of a step as a function of the remote bytes of each tensor."""

from __future__ import annotations

import math
from typing import NamedTuple

from dak_inductor.cost_model import PRODUCTS, OpCost, op_cost, op_floor
from dak_inductor.errors import PlanError
from dak_inductor.hardware_profile import HardwareProfile, LinkProfile
from dak_inductor.plan import OpUse, PlanProblem
from dak_inductor.split_grid import SplitGrid

_Kinks = tuple[tuple[float, float], ...]  # (share, jump of the slope)


class Line(NamedTuple):
    """One use with its cost. `start` and `kinks` are the slope of one call over the share.

    copied: the link may copy its remote rows ahead: a product that reads all of its weight.
    """

    use: OpUse
    cost: OpCost
    start: float
    kinks: _Kinks
    tensor: int  # -1: reads none of ours
    floor: float
    copied: bool = False


class Piece(NamedTuple):
    """A straight piece of one tensor's cost, between two sizes of its remote part."""

    slope: float  # seconds of objective per remote byte
    start: float
    stop: float
    tensor: int


def cost_lines(problem: PlanProblem, profile: HardwareProfile, link: LinkProfile) -> list[Line]:
    """The uses with their costs, each shape computed once. Raises PlanError for bad input."""
    index = {spec.name: i for i, spec in enumerate(problem.tensors)}
    index[""] = -1
    shapes: dict[tuple[object, ...], tuple[OpCost, float, _Kinks]] = {}
    floors: dict[str, float] = {}
    seen: set[tuple[str, str]] = set()
    lines = []
    for use in problem.uses:
        untouched = use.untouched_share
        touched, other, flops = use.touched_bytes, use.other_bytes, use.flops
        shape = (
            touched, other, flops, untouched, use.kind, use.m, use.n, use.dtype, use.strategy
        )  # fmt: skip
        known = shapes.get(shape)
        if known is None:
            if not (touched >= 0 <= other and flops >= 0 and touched + other + flops < math.inf):
                raise PlanError(f"operator {use.op} reads or computes {(touched, other, flops)}")
            if not 0 <= untouched < 1:
                raise PlanError(f"operator {use.op} leaves a share of {untouched} untouched")
            cost = op_cost(use, profile, link)
            start, kinks = cost.slopes()
            known = shapes[shape] = (cost, start, kinks)
        if use.tensor not in index:
            raise PlanError(f"operator {use.op} reads {use.tensor!r}, which is not planned")
        if not 0 <= use.calls < math.inf:
            raise PlanError(f"operator {use.op} is called {use.calls} times")
        name = (use.graph, use.op)
        if use.kind not in floors:
            floors[use.kind] = op_floor(use.kind, profile)
        floor = 0.0 if name in seen else floors[use.kind]
        seen.add(name)
        cost, start, kinks = known
        tensor = index[use.tensor]
        copied = (
            problem.ring_bytes > 0
            and tensor >= 0
            and use.kind in PRODUCTS
            and problem.tensors[tensor].row_block > 0
            and use.touched_bytes == problem.tensors[tensor].nbytes
            and not untouched
        )
        lines.append(Line(use, cost, start, kinks, tensor, floor, copied))
    return lines


def cost_pieces(
    lines: list[Line], problem: PlanProblem, grids: list[SplitGrid]
) -> list[list[Piece]]:
    """By tensor, the cost's pieces from the fewest to the most remote bytes it may have."""
    start = [0.0] * len(grids)
    marks: list[list[tuple[float, float]]] = [[] for _ in grids]  # (bytes, jump of the slope)
    for line in lines:
        tensor, calls = line.tensor, line.use.calls
        if tensor >= 0:
            start[tensor] += calls * line.start
            nbytes = grids[tensor].nbytes
            marks[tensor] += [(share * nbytes, calls * jump) for share, jump in line.kinks]
    pieces = []
    for tensor, (spec, grid) in enumerate(zip(problem.tensors, grids, strict=True)):
        slope, nbytes = start[tensor], grid.nbytes
        position, high = float(grid.low), grid.high
        if spec.current_remote is not None:
            marks[tensor].append((float(spec.current_remote), 0.0))
        own = []
        for mark, jump in [*sorted(marks[tensor]), (float(high), 0.0)]:
            stop = min(mark, high)
            if stop > position:
                own.append(Piece(slope / nbytes, position, stop, tensor))
                position = stop
            slope += jump
        pieces.append(own)
    return pieces
