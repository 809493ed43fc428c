"""Which bytes go remote: greedily for operators that read remote bytes directly, evenly over the
step where copies ahead are predicted to be faster (`ahead_placement`).

The weighted time of all uses of a tensor is convex and piecewise linear in its remote bytes, and
the tensors share one constraint only, how many bytes are remote in all. Taking the pieces of all
tensors in order of seconds per byte is then optimal: it is the optimum of the linear program, which
is the plan's `objective_bound`. Rounding to splits that memory can have comes after it.
Pure: no GPU, no tensor, the same plan for the same problem in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from operator import attrgetter
from typing import NamedTuple

from dak_inductor import ahead_placement
from dak_inductor.copy_ring import MARGIN
from dak_inductor.cost_curve import cost_lines, cost_pieces
from dak_inductor.errors import BudgetError, PlanError
from dak_inductor.exchange import Exchange
from dak_inductor.greedy import fill, round_splits, steepest_slope
from dak_inductor.hardware_profile import HardwareProfile
from dak_inductor.plan import Plan, PlanProblem
from dak_inductor.quantity_text import count_text
from dak_inductor.schedule import Schedule
from dak_inductor.split_grid import SplitGrid, split_grid
from dak_inductor.tensor_names import natural
from dak_inductor.use_columns import UseColumns

_EVEN = 0.005
"""Of the time: so little is not worth the bytes of more tensors. Predictions are not that good: of
8 Llama-3-8B layers with a quarter remote three matrices each, whose copies fit into a ring two at a
time, took 3 to 5% more than one, and 0.2% less by prediction (H200)."""


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
    columns = UseColumns(problem, profile, lines, grids)
    pieces = cost_pieces(lines, problem, grids)
    rank = _rank(problem)
    asked = max(problem.remote_bytes, sum(grid.low for grid in grids))

    steepest = steepest_slope(pieces)
    relaxed = fill(pieces, grids, asked, rank, steepest, [0] * len(grids), 0.0)
    objective_bound = columns.objective(relaxed.remote)
    current = [spec.current_remote or 0 for spec in problem.tensors]
    price = 0.0
    if any(current):
        price = move_tolerance * steepest
        relaxed = fill(pieces, grids, asked, rank, steepest, current, price)
    rounded = round_splits(relaxed, pieces, grids, current, asked)
    if any(spec.page is not None for spec in problem.tensors):
        rounded = Exchange(rounded, pieces, grids, asked, rank, price).run()
    best = Schedule(columns, rounded)
    spreads = ahead_placement.placements(columns, pieces, grids, asked)
    if spreads:
        schedules = [
            min((Schedule(columns, spread) for spread in alike), key=attrgetter("expected"))
            for alike in spreads
        ]
        least = (1 + _EVEN) * min(schedule.expected for schedule in schedules)
        ahead = next(schedule for schedule in schedules if schedule.expected <= least)
        # also where both take as long: the ring of copies does not reach from one whole tensor to
        # the next
        even = ahead.staged and ahead.expected <= best.expected * (1 + move_tolerance)
        # read directly too: few products that read both memories instead of all, which the greedy
        # fill does not see; over NVLink with a ring of 4 MiB that is a third of a step
        if even or ahead.expected < best.expected * (1 - MARGIN):
            best = ahead
    if _is_allowed(problem, grids, asked):
        now = Schedule(columns, current)
        if now.expected <= best.expected * (1 + move_tolerance):
            best = now
    return best.plan(objective_bound)


class GraphSeconds(NamedTuple):
    """Sums of calls x time over a graph's products and over its other uses."""

    products: float
    others: float


def seconds_by_graph(
    problem: PlanProblem, remote: Mapping[str, int], profile: HardwareProfile
) -> dict[str, GraphSeconds]:
    """With these `remote` bytes of each tensor, wherever they may be split; all that placements are
    compared by (`Schedule.expected`)."""
    grids = [split_grid(spec) for spec in problem.tensors]
    lines = cost_lines(problem, profile, profile.link(problem.remote))
    columns = UseColumns(problem, profile, lines, grids)
    wanted = [remote[spec.name] for spec in problem.tensors]
    of_products, of_others = Schedule(columns, wanted).expected_by_graph()
    sums = zip(columns.graphs, map(GraphSeconds, of_products, of_others), strict=True)
    return dict(sums)


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
            f"{total:,} bytes planned may ({pinned} of {count_text(len(grids), 'tensor')} held "
            f"back): let more tensors leave, or ask {problem.remote_bytes - possible:,} bytes less "
            "of them (more gpu_memory, a smaller offload_ratio)"
        )


def _rank(problem: PlanProblem) -> list[int]:
    """Place of each tensor among equals: the largest first, so that few are split, and those of one
    size from all over the model.

    Between remote bytes that lie together and the next ones the link works ahead only as far as its
    ring holds: of 8 equal layers that run in 1 ms, 2 neighbours leave it idle for half of that.
    """
    tensors = problem.tensors
    by_size: dict[int, list[int]] = {}
    for index in sorted(range(len(tensors)), key=lambda i: natural(tensors[i].name)):
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


@lru_cache(maxsize=256)
def _spread(count: int) -> tuple[int, ...]:
    """0 to count - 1 in an order of which every beginning is spread over the whole: by their bits
    from the last to the first."""
    width = max(1, (count - 1).bit_length())
    return tuple(sorted(range(count), key=lambda number: int(f"{number:0{width}b}"[::-1], 2)))


def _is_allowed(problem: PlanProblem, grids: list[SplitGrid], asked: int) -> bool:
    """Whether everything may stay where it is."""
    total = 0
    for spec, grid in zip(problem.tensors, grids, strict=True):
        there = spec.current_remote
        if there is None or not grid.low <= there <= grid.high:
            return False
        total += there
    return total >= asked
