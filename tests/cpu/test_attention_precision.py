"""Errors of staged attention against fp32, simulated: what the calls of a plan round, and no more.

A stock forward rounds weights before it multiplies values by them, and its result; torch's own
attention is one such call. The Triton forward rounds the weights alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dak_inductor import hardware
from dak_inductor.benchmarks.harness.accuracy import ALLOWED_FACTOR, errors
from dak_inductor.lowering.attention import staged_plan
from dak_inductor.lowering.attention.partial_results import PartialResult, PartialResults
from dak_inductor.lowering.attention.staged_parts import Forward, Piece, PrefillProblem

H200 = hardware.load("h200")
PROBLEM = PrefillProblem(1, 16, 1, 256, 1024, 128, 128, "bfloat16", True)
SEEDS = (4, 11, 12)
"""Of 40 draws one in ten errs more than twice as much as torch where stock forwards are merged."""


@dataclass(frozen=True)
class Draw:
    """Operands in bf16, widened; scores [heads, rows, tokens] scaled and masked."""

    scores: Tensor
    value: Tensor

    def call(self, piece: Piece, dtype: torch.dtype) -> PartialResult:
        scores = self.scores[:, piece.first_row : piece.last_row, piece.start : piece.stop]
        top = scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        weights = torch.exp(scores - top)
        total = weights.sum(-1, keepdim=True)
        sums = rounded(weights) @ self.value[piece.start : piece.stop]
        out = (sums / total).transpose(0, 1).unsqueeze(0).contiguous()
        return PartialResult(piece.first_row, out.to(dtype), (top + total.log())[..., 0][None])

    def merged(self, pieces: Iterable[Piece]) -> Tensor:
        results = PartialResults(PROBLEM.queries, torch.bfloat16)
        for piece in pieces:
            dtype = torch.float32 if piece.forward == "triton" else torch.bfloat16
            results.add(self.call(piece, dtype))
        return results.result()

    def exact(self) -> Tensor:
        return (torch.softmax(self.scores, -1) @ self.value)[None]


def rounded(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).float()


def draw_of(seed: int) -> Draw:
    """Scores of deviation 1.6: in a rare row one token outweighs the others."""
    heads, rows, tokens = PROBLEM.query_heads, PROBLEM.queries, PROBLEM.tokens
    random = torch.Generator().manual_seed(seed)
    query = rounded(1.6 * torch.randn(heads, rows, 128, generator=random))
    key, value = (rounded(torch.randn(tokens, 128, generator=random)) for _ in range(2))
    scores = query @ key.T / math.sqrt(128)
    hidden = torch.ones(rows, tokens, dtype=torch.bool).triu(PROBLEM.past + 1)
    return Draw(scores.masked_fill(hidden, -torch.inf), value)


def factors(forwards: tuple[Forward, ...]) -> list[float]:
    """The largest error of the plan over torch's own, of each draw."""
    plan = staged_plan.choose(PROBLEM, 512, H200, H200.link("cpu"), forwards)
    assert len(plan.pieces) > 1
    alone = Piece(0, PROBLEM.queries, 0, PROBLEM.tokens, False, "flash")
    found = []
    for draw in map(draw_of, SEEDS):
        exact = draw.exact()
        ours, own = (errors(draw.merged(pieces), exact) for pieces in (plan.pieces, [alone]))
        found.append(ours.max_abs / own.max_abs)
        assert ours.rms < 1.3 * own.rms
    return found


def test_results_that_are_merged_unrounded_err_as_one_call_does() -> None:
    assert max(factors(("cudnn", "triton"))) < 1.2


def test_rounded_ones_err_more_than_twice_as_much_in_some_draws() -> None:
    """What the plan keeps from rows of few tokens; without the Triton forward it cannot."""
    assert max(factors(("cudnn",))) > ALLOWED_FACTOR
