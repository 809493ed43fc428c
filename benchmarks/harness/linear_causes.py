"""Why a linear is over its bar, as far as its record shows: rules over the cell and its neighbours.

What each cause means, how it was isolated and what was tried against it is docs/measurements.md.
A cell that no rule explains has the cause NOT_ISOLATED.
"""

from __future__ import annotations

import torch

from dak_inductor import hardware
from dak_inductor.benchmarks.harness.grid_record import Cell, GridRecord, Missed
from dak_inductor.lowering.linear.problem import LinearProblem
from dak_inductor.lowering.linear.ring_timing import multiply_seconds

LOCAL_ALONE = "local bytes alone"
LOCAL_AND_REMOTE = "local bytes, and more beside remote reads"
BESIDE_REMOTE = "beside remote reads"
BOTH_TO_THE_END = "both to the end"
START_AND_END = "start and end"
REPEATS_APART = "repeats apart"
COUNT = "count of reads"
FIXED_PART = "fixed part"
RESIDENT_TOO = "cuBLAS as well"
STREAM_RATE = "rate of tensor copies"
DIVIDED = "divided product"
LAST_COPY = "behind the last copy"
STOCK_READS = "stock reads over the link"
LINK_RATE = "rate of the link"
FEW_ROWS = "few rows of the last tile"
KERNEL_RATE = "products of the kernel"
PARTS = "parts of less than a wave"
NOT_BESIDE = "one after the other in the ring"
NOT_ISOLATED = "cause not isolated"

BALANCE = 2.0
"""Near balance neither local nor remote bytes take longer than so many times the other."""
START_AND_END_MOST = 7.5
"""Microseconds of T - L that a launch costs at any size; docs/measurements.md has the spread."""
COUNT_MOST = 3.5
"""Microseconds: counting a stock operator's reads takes 0.5 to 3.1 behind it."""
TILE_ROWS = 128
FEW_ROWS_TOKENS = 64
"""With more a step of a whole tile takes as long as one that lacks rows."""
SMALL_WEIGHT = 60e6
DIVIDED_MOST = 35.0
"""Microseconds for copies, their events and one product more."""
PREFILL_START_MOST = 16.0
ADDED_BY_REMOTE = 4.0
"""Microseconds over the cell with nothing remote, at most, where the local bytes alone are over."""


def cause(grid: GridRecord, over: Missed) -> str:
    if over.bar.startswith("prefill") or over.cell["M"] > 128:
        return _prefill(grid, over)
    if over.cell["fraction"] == 0.0:
        return _resident(over)
    return _decode(grid, over)


def _decode(grid: GridRecord, over: Missed) -> str:
    cell = over.cell
    local, remote = grid.local(cell), grid.remote(cell)
    if local >= remote:
        without = grid.without_remote(cell)
        if max(without, cell["C_microseconds"]) <= over.limit:
            return BESIDE_REMOTE
        little = cell["microseconds"] - without <= ADDED_BY_REMOTE
        return LOCAL_ALONE if little else LOCAL_AND_REMOTE
    if over.over_bound <= START_AND_END_MOST:
        return START_AND_END
    if remote < BALANCE * local:
        return BOTH_TO_THE_END
    if _fastest(grid, over) > over.limit:
        return LINK_RATE
    if cell["M"] <= FEW_ROWS_TOKENS and _lacks_rows(cell) and _whole_tiles_are_in_time(grid, cell):
        return FEW_ROWS
    return REPEATS_APART if over.once_met else NOT_ISOLATED


def _lacks_rows(cell: Cell) -> bool:
    """Whether the last remote tile of our kernel is not whole."""
    rows = cell["remote_bytes"] // (cell["weight_bytes"] // cell["N"])
    return cell["served_by"] == "direct" and rows % TILE_ROWS != 0


def _whole_tiles_are_in_time(grid: GridRecord, cell: Cell) -> bool:
    """Whether more remote rows of that weight with as many tokens, which fill their tiles, take no
    more than start and end over their bytes."""
    others = [
        other
        for other in grid.cells
        if (other["shape"], other["M"]) == (cell["shape"], cell["M"])
        and other["fraction"] > cell["fraction"]
        and other["served_by"] == "direct"
        and not _lacks_rows(other)
    ]
    return any(
        other["microseconds"] - other["L_microseconds"] <= START_AND_END_MOST for other in others
    )


def _fastest(grid: GridRecord, over: Missed) -> float:
    """Of all times with that weight and share, by any kernel and of any number of tokens; 0 where
    no kernel but ours was measured."""
    beside = [
        cell
        for cell in grid.cells
        if cell["shape"] == over.cell["shape"] and cell["fraction"] == over.cell["fraction"]
    ]
    own = [float(cell["microseconds"]) for cell in beside]
    others = [float(time) for cell in beside for time in cell["peers_microseconds"].values()]
    return min(*own, *others) if others else 0.0


def _resident(over: Missed) -> str:
    """Nothing remote, decode."""
    cell = over.cell
    if "HBM" in over.bar:
        return RESIDENT_TOO if cell["C_microseconds"] > over.limit else STREAM_RATE
    if cell["served_by"] == "stock" and over.over_resident <= COUNT_MOST:
        return COUNT
    if cell["weight_bytes"] < SMALL_WEIGHT:
        return FIXED_PART
    return REPEATS_APART if over.once_met else NOT_ISOLATED


def _prefill(grid: GridRecord, over: Missed) -> str:
    cell = over.cell
    if cell["fraction"] == 0.0:
        if over.over_resident <= COUNT_MOST:
            return COUNT
        return REPEATS_APART if over.once_met else NOT_ISOLATED
    least = max(cell["L_microseconds"], cell["C_microseconds"])
    more = cell["microseconds"] - least
    if cell["served_by"] == "stock":
        return COUNT if over.over_resident <= COUNT_MOST else STOCK_READS
    if over.once_met:
        return REPEATS_APART
    if cell["served_by"] == "direct":
        if more <= PREFILL_START_MOST:
            return START_AND_END
        return KERNEL_RATE if _kernel_alone(grid, cell) > over.limit else NOT_ISOLATED
    if more > DIVIDED_MOST:
        if _more_by_parts(cell) >= more / 2:
            return PARTS
        more_by_plan = cell.get("ring_microseconds", 0.0) - least
        return NOT_BESIDE if more_by_plan >= more / 2 else NOT_ISOLATED
    return LAST_COPY if grid.remote(cell) > cell["C_microseconds"] else DIVIDED


def _kernel_alone(grid: GridRecord, cell: Cell) -> float:
    """What the kernel took in the trial of the same weight and tokens with the least remote, where
    products are the bound; 0 where that is not known."""
    beside = [
        other
        for other in grid.cells
        if (other["shape"], other["M"]) == (cell["shape"], cell["M"])
        and "direct" in (other.get("trial_microseconds") or {})
        and BALANCE * grid.remote(other) < other["C_microseconds"]
    ]
    least = min(beside, key=lambda other: other["fraction"], default=None)
    return 0.0 if least is None else float(least["trial_microseconds"]["direct"])


def _more_by_parts(cell: Cell) -> float:
    """What the ring's products take longer than one of all features, by the plan's own timing."""
    parts = cell.get("ring_parts")
    if not parts:
        return 0.0
    problem = LinearProblem(cell["M"], cell["N"], cell["K"], torch.bfloat16)
    profile = hardware.load("h200")
    times = [multiply_seconds(problem, features, profile) for features in (*parts, cell["N"])]
    return 1e6 * (sum(times[:-1]) - times[-1])
