"""How long the copies, the calls and the merge of staged attention take, from the profile."""

from __future__ import annotations

import math
from functools import lru_cache

from dak_inductor.cost_model import peak_flops
from dak_inductor.hardware_profile import HardwareProfile, LinkProfile
from dak_inductor.lowering.attention.partial_results import full
from dak_inductor.lowering.attention.staged_parts import ROWS, Part, Piece, PrefillProblem
from dak_inductor.lowering.copy_cost import device_copy_seconds, link_copy_seconds

RATE = {"cudnn": 0.80, "flash": 0.41, "triton": 0.53}
"""Shares of the dense peak that the forwards reach at head_dim 128. Measured on the H200, 32 query
heads over 8 key heads, in TFLOP/s of a peak of 800 with the fixed cost of a call inside: rectangles
640 (cuDNN), 330 (flash), 420 (Triton); causal over 8192 tokens 555, 313, 423."""
CAUSAL_RATE = {"cudnn": 0.71, "flash": 0.41, "triton": 0.53}
"""The same under a triangle, of the operations that it leaves."""
CALL_SECONDS = 10e-6
CAUSAL_CALL_SECONDS = 20e-6
"""Fixed cost of a call, its memset included: 2048 causal tokens take cuDNN 81 us, 426 TFLOP/s."""

_MERGE_SHARE = 0.85
"""Of HBM bandwidth. Nine partial results of 8192 rows of 32 heads of 128, merged in two folds, took
163 us in 7 launches for what should be 562 MB (H200)."""
_MERGE_SECONDS = 3e-6  # of a launch: the shortest takes 5 us


class StagedTiming:
    """How long copies and calls of a problem take; few differ."""

    def __init__(
        self,
        problem: PrefillProblem,
        local: int,
        profile: HardwareProfile,
        link: LinkProfile,
    ) -> None:
        self._problem, self._local = problem, local
        self._profile, self._link = profile, link
        self.attend = lru_cache(self._attend)

    def copy(self, part: Part) -> float:
        """Keys and values into a slot, local ones and remote ones apart."""
        problem = self._problem
        local = min(max(self._local, part.start), part.stop) - part.start
        seconds = 0.0
        for width in (problem.head_dim, problem.value_dim):
            token_bytes = problem.token_bytes * width // (problem.head_dim + problem.value_dim)
            remote = (part.tokens - local) * token_bytes
            seconds += link_copy_seconds(remote, self._profile, self._link)
            seconds += device_copy_seconds(local * token_bytes, self._profile)
        return seconds

    def _attend(self, piece: Piece) -> float:
        """One call: its products in whole waves of thread blocks, or what it reads and writes.

        Flash cuts the tokens of a call that has too few blocks, the others do not.
        """
        problem, profile = self._problem, self._profile
        peak = _peak(problem.dtype, profile)
        per_pair = 2 * (problem.head_dim + problem.value_dim)
        heads = problem.batch * problem.query_heads
        blocks = heads * math.ceil(piece.rows / ROWS)
        pairs = self._pairs(piece)
        padded = pairs * math.ceil(piece.rows / ROWS) * ROWS / piece.rows
        flops = heads * padded * per_pair
        waves = math.ceil(blocks / profile.sm_count) * profile.sm_count / blocks
        if piece.forward == "flash" and blocks < profile.sm_count:
            waves = 1.0
        rate = (CAUSAL_RATE if piece.causal else RATE)[piece.forward]
        # blocks of a triangle differ in length: short ones fill the last wave
        compute = flops * (1.0 if piece.causal and blocks > profile.sm_count else waves)
        nbytes = (piece.stop - piece.start) * problem.token_bytes + 2 * self._out_bytes(piece)
        hides = pairs < piece.rows * (piece.stop - piece.start)
        fixed = CAUSAL_CALL_SECONDS if hides else CALL_SECONDS
        return fixed + max(compute / (peak * rate), nbytes / profile.hbm_bandwidth)

    def _pairs(self, piece: Piece) -> float:
        """Rows times the tokens that each sees; the Triton forward leaves out blocks of tokens that
        no row of a block sees."""
        if piece.forward != "triton" or not self._problem.causal:
            return piece.pairs
        first = self._problem.past + piece.first_row + 1 - piece.start  # seen by the first row
        last, tokens = first + piece.rows - 1, piece.stop - piece.start
        return max(1.0, _triangle(last) - _triangle(first - 1) - _excess(first, last, tokens))

    def merge(self, pieces: tuple[Piece, ...]) -> float:
        """Each row's partial results read once and its result written, in a launch for each run of
        rows; more of them than fit one fold also an fp32 result, written and read. None for one
        piece."""
        if len(pieces) == 1:
            return 0.0
        edges = {edge for piece in pieces for edge in (piece.first_row, piece.last_row)}
        folds = self._folds(pieces)
        merged = self._problem.queries * self._row_elements
        nbytes = sum(map(self._out_bytes, pieces)) + merged * (self._size + 2 * folds * 4)
        launches = (1 + folds) * (len(edges) - 1)
        seconds = nbytes / (_MERGE_SHARE * self._profile.hbm_bandwidth)
        return launches * _MERGE_SECONDS + seconds

    def _folds(self, pieces: tuple[Piece, ...]) -> int:
        """Merges before the last one."""
        folds = pending = held = 0
        for piece in pieces:
            if full(pending, held, merged=folds > 0):
                folds, pending, held = folds + 1, 0, 0
            pending += 1
            held += self._out_bytes(piece)
        return folds

    @property
    def _size(self) -> int:
        return 4 if self._problem.dtype == "float32" else 2

    @property
    def _row_elements(self) -> int:
        problem = self._problem
        return problem.batch * problem.query_heads * problem.value_dim

    def _out_bytes(self, piece: Piece) -> int:
        """Of a result that is merged."""
        size = 4 if piece.forward == "triton" else self._size
        return piece.rows * self._row_elements * size


def _triangle(number: int) -> float:
    """1 + 2 + ... + number; 0 for none."""
    return max(0, number) * (max(0, number) + 1) / 2


def _excess(first: int, last: int, tokens: int) -> float:
    """By how much numbers first .. last exceed `tokens`, together."""
    return _triangle(last - tokens) - _triangle(first - 1 - tokens)


def _peak(dtype: str, profile: HardwareProfile) -> float:
    """The matmul rate; that of float32, where the profile has none, is a guess from bfloat16's."""
    if dtype == "float32":
        return profile.matmul_flops.get(dtype, peak_flops(profile, "bfloat16") / 16)
    return peak_flops(profile, dtype)
