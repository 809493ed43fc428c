"""Why an attention call is over its bar, as far as its record shows; see linear_causes."""

from __future__ import annotations

from dak_inductor.benchmarks.harness.attention_grid import MOST_DECODE_QUERIES, parse_shapes
from dak_inductor.benchmarks.harness.grid_record import GridRecord, Missed
from dak_inductor.benchmarks.harness.linear_causes import (
    BALANCE,
    BESIDE_REMOTE,
    BOTH_TO_THE_END,
    LOCAL_ALONE,
    LOCAL_AND_REMOTE,
    NOT_ISOLATED,
)

HEAD_SIZE = "rows of the head size"
ONE_AFTER_THE_OTHER = "copies and attention one after the other"
FIXED_AND_RATE = "fixed part and rate"
WHOLE_ROWS = (64, 128, 256)
"""Head sizes whose rows fill the pieces in which tiles are copied."""
ADDED_BY_REMOTE = 8.0
"""Microseconds over the cell with nothing remote, at most, where the local bytes alone are over."""
NO_OVERLAP = 0.95
"""Of the copies' time and attention's, added up."""


def cause(grid: GridRecord, over: Missed) -> str:
    (shape,) = parse_shapes(over.cell["shape"])
    if shape.queries > MOST_DECODE_QUERIES:
        added = grid.copied(over.cell) + over.cell["C_microseconds"]
        slow = over.cell["microseconds"] >= NO_OVERLAP * added
        return ONE_AFTER_THE_OTHER if slow else NOT_ISOLATED
    whole = shape.head_dim in WHOLE_ROWS
    if over.cell["fraction"] == 0.0:
        return FIXED_AND_RATE if shape.head_dim == 128 else NOT_ISOLATED
    local, remote = grid.local(over.cell), grid.remote(over.cell)
    without = grid.without_remote(over.cell)
    if local >= remote / BALANCE and max(without, over.cell["C_microseconds"]) > over.limit:
        little = over.cell["microseconds"] - without <= ADDED_BY_REMOTE
        return LOCAL_ALONE if little else LOCAL_AND_REMOTE
    if remote >= BALANCE * local:
        return NOT_ISOLATED if whole else HEAD_SIZE
    return BOTH_TO_THE_END if local < BALANCE * remote else BESIDE_REMOTE
