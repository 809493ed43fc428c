"""Filling the remote tier by seconds per byte, and rounding to splits that memory can have."""

from __future__ import annotations

import math
from typing import NamedTuple

from dak_inductor.cost_curve import Piece
from dak_inductor.split_grid import SplitGrid

# slopes closer than this share of the steepest one are equal: sums in another order differ by less
_SLOPE_RESOLUTION = 1e-12


class Fill(NamedTuple):
    """Remote bytes by tensor before rounding, and the price of one more byte."""

    remote: list[float]
    price: float
    order: list[Piece]
    reached: int  # index in `order` of the last piece used


def steepest_slope(pieces: list[list[Piece]]) -> float:
    """The largest change of the objective per byte, seconds."""
    return max((abs(piece.slope) for own in pieces for piece in own), default=0.0)


def fill(
    pieces: list[list[Piece]],
    grids: list[SplitGrid],
    asked: int,
    rank: list[int],
    steepest: float,
    current: list[int],
    move_price: float,
) -> Fill:
    """Take pieces by slope until `asked` bytes are remote; bytes that are remote go first among
    equals, and `move_price` seconds per byte cheaper than others. `steepest` is their
    `steepest_slope`."""
    scale = 1 / (steepest * _SLOPE_RESOLUTION) if steepest else 0.0
    keyed = []
    for tensor, own in enumerate(pieces):
        there, place, before = current[tensor], rank[tensor], -math.inf
        for number, piece in enumerate(own):
            away = piece.stop > there
            slope = max(before, round((piece.slope - (0.0 if away else move_price)) * scale))
            before = slope  # a kink within rounding of another must not turn the order around
            keyed.append((slope, away, place, number, piece))
    keyed.sort()
    order = [entry[4] for entry in keyed]
    remote = [float(grid.low) for grid in grids]
    missing = asked - math.fsum(remote)
    price, reached = 0.0, 0
    for number, piece in enumerate(order):
        price, reached = piece.slope, number
        length = piece.stop - piece.start
        if length >= missing:
            remote[piece.tensor] = piece.start + max(missing, 0.0)
            break
        remote[piece.tensor] = piece.stop
        missing -= length
    return Fill(remote, price, order, reached)


def round_splits(
    filled: Fill,
    pieces: list[list[Piece]],
    grids: list[SplitGrid],
    current: list[int],
    asked: int,
) -> list[int]:
    """Splits on the grids with at least `asked` bytes remote.

    A tensor that is to stay where it is stays there exactly. Each other goes to the neighbour on
    its grid that costs less at the price of a byte; the last tensors filled take up what is left.
    """
    rounded = []
    for remote, own, grid, there in zip(filled.remote, pieces, grids, current, strict=True):
        if remote == there:
            rounded.append(there)
            continue
        above, below = grid.at_least(math.ceil(remote)), grid.at_most(math.floor(remote))
        if above != below:
            left = next((p.slope for p in reversed(own) if p.start < remote), -math.inf)
            right = next((p.slope for p in own if p.stop > remote), math.inf)
            loss_above = (above - remote) * (right - filled.price)
            loss_below = (remote - below) * (filled.price - left)
            above = above if loss_above <= loss_below else below
        rounded.append(above)
    missing = asked - sum(rounded)
    for piece in filled.order[filled.reached :] if missing > 0 else ():
        before, grid = rounded[piece.tensor], grids[piece.tensor]
        target = min(before + missing, math.ceil(piece.stop))
        rounded[piece.tensor] = max(before, grid.at_least(target))
        missing -= rounded[piece.tensor] - before
        if missing <= 0:
            break
    for piece in reversed(filled.order[: filled.reached + 1]) if missing < 0 else ():
        if piece.slope <= 0 or missing == 0:
            break  # a byte given back here would cost time
        before, grid = rounded[piece.tensor], grids[piece.tensor]
        target = max(before + missing, math.floor(piece.start))
        rounded[piece.tensor] = min(before, grid.at_least(target))
        missing += before - rounded[piece.tensor]
    return rounded
