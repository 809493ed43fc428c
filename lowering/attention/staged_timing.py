"""How long the copies, the calls and the merge of staged attention take, from the profile."""

from __future__ import annotations

import math
from functools import lru_cache

from dak_inductor.hardware import HardwareProfile, LinkProfile
from dak_inductor.lowering.attention.staged_parts import Forward, Part, Piece, PrefillProblem
from dak_inductor.lowering.linear.ring_plan import piece_overhead

ROWS = 128
"""Query rows of one thread block of the stock forwards."""
RATE = {"cudnn": 0.72, "flash": 0.45, "triton": 0.35}
"""Shares of the dense peak that the forwards reach at head_dim 128: assumed, not measured."""

_MERGE_SHARE = 0.7  # of HBM bandwidth, assumed of the merge
_LOCAL_COPY_SHARE = 0.25  # of HBM bandwidth, assumed of copies inside device memory


class StagedTiming:
    """How long copies and calls of a problem take with one forward; few differ."""

    def __init__(
        self,
        problem: PrefillProblem,
        local: int,
        forward: Forward,
        profile: HardwareProfile,
        link: LinkProfile,
    ) -> None:
        self._problem, self._local, self.forward = problem, local, forward
        self._profile, self._link = profile, link
        self.attend = lru_cache(self._attend)

    def copy(self, part: Part) -> float:
        """Keys and values into a slot, local ones and remote ones apart."""
        local = min(max(self._local, part.start), part.stop) - part.start
        copies = 2 * (bool(local) + (local < part.tokens))
        seconds = copies * piece_overhead(self._profile, self._link)
        local_rate = _LOCAL_COPY_SHARE * self._profile.hbm_bandwidth
        token_bytes = self._problem.token_bytes
        remote = (part.tokens - local) * token_bytes / self._link.copy_bandwidth
        return seconds + remote + local * token_bytes / local_rate

    def _attend(self, piece: Piece) -> float:
        """One call: its products in whole waves of thread blocks, or what it reads and writes.

        Flash cuts the tokens of a call that has too few blocks, the others do not.
        """
        problem, profile = self._problem, self._profile
        peak = profile.matmul_flops.get(problem.dtype, profile.matmul_flops["bfloat16"] / 16)
        per_pair = 2 * (problem.head_dim + problem.value_dim)
        heads = problem.batch * problem.query_heads
        blocks = heads * math.ceil(piece.rows / ROWS)
        padded = piece.pairs * math.ceil(piece.rows / ROWS) * ROWS / piece.rows
        flops = heads * padded * per_pair
        waves = math.ceil(blocks / profile.sm_count) * profile.sm_count / blocks
        if self.forward == "flash" and blocks < profile.sm_count:
            waves = 1.0
        compute = flops * waves / (peak * RATE[self.forward])
        nbytes = (piece.stop - piece.start) * problem.token_bytes + 2 * self._out_bytes(piece)
        return profile.operator_floor + max(compute, nbytes / profile.hbm_bandwidth)

    def merge(self, pieces: tuple[Piece, ...]) -> float:
        """Each row's partial results read once and its result written; none for one piece."""
        if len(pieces) == 1:
            return 0.0
        rows = sum(piece.rows for piece in pieces) + self._problem.queries
        nbytes = rows * self._row_bytes
        floors = min(len(pieces), 4) * self._profile.operator_floor
        return floors + nbytes / (_MERGE_SHARE * self._profile.hbm_bandwidth)

    @property
    def _row_bytes(self) -> int:
        size = 4 if self._problem.dtype == "float32" else 2
        return self._problem.batch * self._problem.query_heads * self._problem.value_dim * size

    def _out_bytes(self, piece: Piece) -> int:
        return piece.rows * self._row_bytes
