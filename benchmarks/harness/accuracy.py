"""Accuracy against fp32: errors at most twice those of torch's own operators in the same dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

ALLOWED_FACTOR = 2.0


@dataclass(frozen=True, slots=True)
class Errors:
    """RMS and largest absolute error against fp32; infinite where an output was not finite."""

    rms: float
    max_abs: float


@dataclass(frozen=True, slots=True)
class AccuracyVerdict:
    """A provider's errors beside torch's own in the same dtype."""

    ours: Errors
    torch_own: Errors
    passed: bool


def errors(output: torch.Tensor, reference: torch.Tensor) -> Errors:
    """Errors of `output` against the fp32 `reference` of the same shape."""
    if output.shape != reference.shape:
        raise ValueError(f"output is {tuple(output.shape)}, reference {tuple(reference.shape)}")
    difference = output.detach().to(reference.device, torch.float32) - reference
    rms = difference.square().mean().sqrt().item()
    max_abs = difference.abs().max().item()
    if not (math.isfinite(rms) and math.isfinite(max_abs)):
        return Errors(math.inf, math.inf)
    return Errors(rms, max_abs)


def judge(ours: Errors, torch_own: Errors) -> AccuracyVerdict:
    """Both errors within twice torch's own."""
    passed = (
        math.isfinite(ours.rms)
        and ours.rms <= ALLOWED_FACTOR * torch_own.rms
        and ours.max_abs <= ALLOWED_FACTOR * torch_own.max_abs
    )
    return AccuracyVerdict(ours, torch_own, passed)


@dataclass(frozen=True, slots=True)
class TokenAgreement:
    """Greedy tokens at the positions whose fp32 margin exceeds what rounding can overturn."""

    positions: int
    decided: int
    agreeing: int

    @property
    def passed(self) -> bool:
        """False too when no position was decided: such a run proves nothing."""
        return self.decided > 0 and self.agreeing == self.decided


def token_agreement(
    ours: torch.Tensor, resident: torch.Tensor, reference: torch.Tensor, error: float
) -> TokenAgreement:
    """Compare the argmax of `ours` and `resident` logits [tokens, vocabulary] by position.

    A position counts where the fp32 `reference` has a margin between its two best tokens of more
    than 2 * `error` (both may err by that much); `error` is torch's own largest error in this
    dtype.
    """
    best = reference.float().topk(2, dim=-1).values
    decided = (best[:, 0] - best[:, 1]) > 2 * error
    same = ours.argmax(-1) == resident.to(ours.device).argmax(-1)
    agreeing = int((same & decided.to(same.device)).sum())
    return TokenAgreement(reference.shape[0], int(decided.sum()), agreeing)


def poison(output: object) -> None:
    """Fill an output tensor with NaN, so that an element that a step fails to write shows."""
    if isinstance(output, torch.Tensor) and output.is_floating_point():
        output.fill_(math.nan)
