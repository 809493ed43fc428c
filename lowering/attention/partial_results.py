"""Results of attention over parts of the tokens, merged by their log-sum-exp in fp32.

A row's result is the sum of its partial results, each times exp(lse - total lse), where the total
is the log-sum-exp of all of them. Partial results are kept in the dtype of the forward, and merged
a few at a time: one pass over several costs less memory traffic than one pass for each.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dak_inductor.lowering.op_facts import triton_importable

MOST_PENDING = 8
"""Partial results merged at once, what was merged before included: the kernel takes eight."""
PENDING_BYTES = 256 * 2**20
"""Bytes of them from which on they are merged before another comes, even if they are fewer."""


def full(pending: int, nbytes: int, *, merged: bool) -> bool:
    """Whether so many partial results are merged before another is taken in."""
    return pending + merged >= MOST_PENDING or (pending > 2 and nbytes > PENDING_BYTES)


@dataclass(frozen=True, slots=True)
class PartialResult:
    """Rows [first_row, first_row + rows) of a query over some of the tokens.

    Attributes:
        out: [B, rows, Hq, Dv], contiguous.
        lse: [B, Hq, rows] fp32, contiguous: of the scaled scores, natural. Anything not finite
            says that the row saw nothing, and `out` is not read.
    """

    first_row: int
    out: Tensor
    lse: Tensor

    @property
    def last_row(self) -> int:
        return self.first_row + self.out.shape[1]


class PartialResults:
    """What a query of `rows` rows has so far.

    Args:
        rows: of the query.
        dtype: of the result.
    """

    def __init__(self, rows: int, dtype: torch.dtype) -> None:
        self._rows, self._dtype = rows, dtype
        self._pending: list[PartialResult] = []
        self._merged: PartialResult | None = None

    def add(self, partial: PartialResult) -> None:
        """Take in a partial result; its tensors are the collection's from here on."""
        held = sum(pending.out.nbytes for pending in self._pending)
        if full(len(self._pending), held, merged=self._merged is not None):
            self._fold()  # only now: what fits one merge needs no fp32 result in between
        self._pending.append(partial)

    def result(self) -> Tensor:
        """[B, Hq, rows, Dv], stored as [B, rows, Hq, Dv]; 0 in rows that saw nothing.

        At least one partial result must have been added.
        """
        if len(self._pending) == 1 and self._merged is None:
            (only,) = self._pending
            if only.out.shape[1] == self._rows and only.out.dtype == self._dtype:
                return only.out.transpose(1, 2)
        out = self._empty(self._dtype)
        self._merge(self._partials(), out, None)
        return out.transpose(1, 2)

    def _fold(self) -> None:
        """Merge what there is into a new fp32 result over all rows.

        Not in place: each warp of the merging kernel reads the log-sum-exps of all of its rows, one
        writes them, and where all results are fp32 there is no barrier in between.
        """
        out = self._empty(torch.float32)
        batch, _, heads, _ = out.shape
        lse = out.new_empty((batch, heads, self._rows))
        self._merge(self._partials(), out, lse)
        self._merged = PartialResult(0, out, lse)
        self._pending = []

    def _partials(self) -> list[PartialResult]:
        return self._pending if self._merged is None else [self._merged, *self._pending]

    def _empty(self, dtype: torch.dtype) -> Tensor:
        like = self._pending[0].out if self._pending else self._merged.out  # type: ignore[union-attr]
        batch, _, heads, width = like.shape
        return like.new_empty((batch, self._rows, heads, width), dtype=dtype)

    def _merge(self, partials: list[PartialResult], out: Tensor, lse: Tensor | None) -> None:
        """All rows of `out` and `lse`, a run of rows with the same partial results at a time."""
        edges = {0, self._rows}
        for partial in partials:
            edges |= {partial.first_row, partial.last_row}
        cuts = sorted(edges)
        for start, stop in pairwise(cuts):
            here = [p for p in partials if p.first_row <= start and p.last_row >= stop]
            if not here:
                out[:, start:stop].zero_()
                if lse is not None:
                    lse[..., start:stop].fill_(-torch.inf)
            else:
                merge(here, start, stop, out, lse)


def merge(
    partials: list[PartialResult], start: int, stop: int, out: Tensor, lse: Tensor | None
) -> None:
    """Rows [start, stop), which each of `partials` has, into those rows of `out` and `lse`.

    `out` [B, rows, Hq, Dv] and `lse` are none of theirs.
    """
    if out.is_cuda and triton_importable():
        from dak_inductor.lowering.triton_attention.merge import launch

        inputs = [(p.out, p.lse, start - p.first_row) for p in partials]
        launch(inputs, start=start, rows=stop - start, out=out, lse=lse)
        return
    slices = [slice(start - p.first_row, stop - p.first_row) for p in partials]
    sums = torch.stack([p.lse[..., rows] for p, rows in zip(partials, slices, strict=True)])
    sums = torch.where(sums.isfinite(), sums, -torch.inf)
    total = torch.logsumexp(sums, 0)
    weights = torch.exp(sums - torch.where(total.isfinite(), total, 0.0))
    merged = torch.zeros_like(out[:, start:stop], dtype=torch.float32)
    for partial, rows, weight in zip(partials, slices, weights, strict=True):
        share = weight.transpose(1, 2).unsqueeze(-1)
        merged += torch.where(share > 0, share * partial.out[:, rows].float(), 0.0)
    out[:, start:stop] = merged
    if lse is not None:
        lse[..., start:stop] = total
