"""Products by the stock operator, for calls like one that was looked at."""

from __future__ import annotations

import torch
from torch import Tensor

from dak_inductor.lowering.linear.counted_reads import count, counted_reads
from dak_inductor.lowering.linear.epilogue import finish
from dak_inductor.lowering.linear.operands import Operands

_linear = torch.ops.aten.linear.default


class StockProduct:
    """Calls of one product with the same weights. It counts what they read."""

    def __init__(self, weights: tuple[Tensor, ...], layout: str) -> None:
        self._counted = counted_reads(weights)
        self._in_out = layout == "in_out"

    def __call__(self, call: Operands) -> Tensor:
        """One call, rounded as the stock composition does."""
        weights = call.weights
        count(self._counted, weights)
        if self._in_out:
            weights = tuple([weight.t() for weight in weights])
        factors = zip(weights, call.biases, strict=True)
        outputs = [_linear(call.x, weight, bias) for weight, bias in factors]
        return finish(outputs, call.activation, call.residual)
