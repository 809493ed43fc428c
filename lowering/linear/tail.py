"""The tail of the local line: how much workers claim at run time, and in pieces of what length.

Nothing here knows the split: a captured launch serves all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dak_inductor.hardware_profile import HardwareProfile
from dak_inductor.lowering.linear.configuration import (
    DEPTH,
    LinearConfiguration,
    piece_seconds,
    step_seconds,
)
from dak_inductor.lowering.linear.problem import LinearProblem

_UNIT = 256  # kernels/schedule/tail.cuh counts shares in parts of that size

SHARE = 64 / _UNIT
"""Of the local tiles. Beside remote reads a few SMs of the H200 stream HBM a quarter slower than
others: 28672 x 8192 at 1%, 64 tokens, runs of equal length ended at 103 to 152 us. With a quarter
left to claims, not a tenth, 8192 x 28672 took 132 us, not 148, and 28672 x 8192 121 as before."""
SPARED = 4
"""Workers without runs: on the H200 the CTA on the SM that is freed last has its first step 10 to
30 us after the others, and with a run of its own ended as much later, launch after launch."""
PIECE_BYTES = 256 * 1024
"""Of weights, at least, in a piece: 7 us of an SM's share of HBM, some times what a claim takes."""
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
    there is no tail. `spared` workers, those started last, have no work besides.
    """

    share: int
    pieces: int
    least: int
    spared: int

    def slots(self, tiles: int) -> int:
        """Pieces, at most, that leave partial sums, whatever part of `tiles` is local."""
        found = tiles * self.share // _UNIT * self.pieces
        return found if found >= self.least and self.pieces > 1 else 0


NO_TAIL = TailRule(share=0, pieces=1, least=1, spared=0)


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
    return TailRule(round(SHARE * _UNIT), max(1, pieces), least, SPARED)
