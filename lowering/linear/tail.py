"""The tail of the local line: how much workers claim at run time, and in pieces of what length.

Nothing here knows the split: a captured launch serves all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dak_inductor.hardware import HardwareProfile
from dak_inductor.lowering.linear.configuration import (
    DEPTH,
    LinearConfiguration,
    piece_seconds,
    step_seconds,
)
from dak_inductor.lowering.linear.problem import LinearProblem

_UNIT = 256  # kernels/schedule/tail.cuh counts shares in parts of that size

SHARE = 23 / _UNIT
"""Of the local tiles: runs of equal length end 4 to 5% apart on the H200, and the worker started
last is up to 17 us behind."""
PIECE_BYTES = 128 * 1024
"""Of weights, at least, in a piece: 4 us of an SM's share of HBM, some times what a claim takes."""
PIECE_COST = 8.0
"""How many times as long as adding it up a piece takes, at least."""
ADDED_BYTES = 256 * 1024
"""Of partial sums of one tile, at most: the last worker adds them up while nobody else has work."""
MOST_SUMS = 128
"""Blocks times tokens of a tile that has a tail: 64 KiB of sums (kernels/linear/layout.cuh)."""
PIECES_OF_WORKER = 0.75
"""Fewer pieces than that for each worker even out nothing."""


@dataclass(frozen=True, slots=True)
class TailRule:
    """What the kernel needs to cut the tail off whatever is local.

    `share` is of the local tiles in 256ths, `pieces` of each tile; with fewer than `least` of them
    there is no tail.
    """

    share: int
    pieces: int
    least: int

    def slots(self, tiles: int) -> int:
        """Pieces, at most, that leave partial sums, whatever part of `tiles` is local."""
        found = tiles * self.share // _UNIT * self.pieces
        return found if found >= self.least and self.pieces > 1 else 0


NO_TAIL = TailRule(share=0, pieces=1, least=1)


def tail_rule(
    problem: LinearProblem,
    configuration: LinearConfiguration,
    profile: HardwareProfile,
    workers: int,
) -> TailRule:
    """The tail for `workers` CTAs of a configuration."""
    if configuration.cluster > 1 or configuration.in_out:
        return NO_TAIL
    if configuration.blocks * configuration.tokens > MOST_SUMS:
        return NO_TAIL
    steps = math.ceil(problem.k / DEPTH)
    adding = piece_seconds(configuration) / step_seconds(configuration, profile)
    length = max(1.0, PIECE_BYTES / configuration.weight_stage_bytes, PIECE_COST * adding)
    pieces = min(int(steps / length), ADDED_BYTES // configuration.partial_bytes)
    least = max(1, math.ceil(workers * PIECES_OF_WORKER))
    return TailRule(round(SHARE * _UNIT), max(1, pieces), least)
