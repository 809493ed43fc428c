"""What attention over cached keys and values must give: torch's own operators, in any precision.

Computed in fp32 it is the reference, in the operands' dtype it is what torch itself would give: a
kernel may err against the former at most twice as much as the latter.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dak_inductor.benchmarks.harness.accuracy import AccuracyVerdict, Errors, errors, judge
from dak_inductor.lowering.attention.operands import AttentionOperands


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """Operands of one call: query [B, Hq, Q, D], key and value [B, Hkv, S, D].

    lengths, starts: int32 [B], or None for S and 0. Masks as `dak::attention` has them.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    lengths: Tensor | None = None
    starts: Tensor | None = None
    scale: float = 1.0
    causal: bool = True
    window: int = 0
    softcap: float = 0.0

    def to(self, dtype: torch.dtype) -> AttentionCall:
        """The same call with queries, keys and values cast."""
        return replace(
            self, query=self.query.to(dtype), key=self.key.to(dtype), value=self.value.to(dtype)
        )

    def operands(self, **other: Any) -> AttentionOperands:
        """Those of dak::attention, with others in place of some."""
        mine = {field.name: getattr(self, field.name) for field in fields(self)}
        return AttentionOperands(**{"mask": None, **mine, **other})

    def seen(self) -> Tensor:
        """Which tokens each query sees: bool [B, 1, Q, S]."""
        queries, tokens, device = self.query.shape[2], self.key.shape[2], self.query.device
        token = torch.arange(tokens, device=device)
        row = torch.arange(queries, device=device).view(1, 1, queries, 1)
        length = self._bounds(self.lengths, tokens)
        seen = (token < length) & (token >= self._bounds(self.starts, 0))
        own = length - queries + row  # the query's own token
        if self.causal:
            seen = seen & (token <= own)
        if self.window:
            seen = seen & (token > own - self.window)
        return seen.expand(self.key.shape[0], 1, queries, tokens)

    def stock(self) -> Tensor:
        """torch's own operators in the operands' dtype; [B, Hq, Q, D], 0 where nothing is seen."""
        ratio = self.query.shape[1] // self.key.shape[1]
        seen = self.seen()
        key = self.key.repeat_interleave(ratio, 1)
        value = self.value.repeat_interleave(ratio, 1)
        blind = ~seen.any(-1, keepdim=True)
        mask = seen | blind
        if self.softcap:
            scores = (self.query @ key.transpose(-1, -2)).float() * self.scale
            scores = self.softcap * torch.tanh(scores / self.softcap)
            weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
            result = weights.to(self.query.dtype) @ value
        else:
            result = functional.scaled_dot_product_attention(
                self.query, key, value, mask, scale=self.scale
            )
        return result.masked_fill(blind, 0.0)

    def _bounds(self, bounds: Tensor | None, default: int) -> Tensor:
        if bounds is None:
            return torch.tensor(default, device=self.query.device)
        return bounds.view(-1, 1, 1, 1)


@dataclass(frozen=True, slots=True)
class AttentionReference:
    """The fp32 result of a call, and the errors of torch's own operators against it."""

    exact: Tensor
    torch_own: Errors

    def judge(self, output: Tensor) -> AccuracyVerdict:
        """Both errors of `output` within twice torch's own; a NaN is an infinite error."""
        return judge(errors(output, self.exact), self.torch_own)


def make_reference(call: AttentionCall) -> AttentionReference:
    """The reference of a call, computed on its device."""
    exact = call.to(torch.float32).stock()
    return AttentionReference(exact, errors(call.stock(), exact))
