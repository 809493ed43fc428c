"""Products by the stock operator, for calls like one that was looked at."""

from __future__ import annotations

import torch
from torch import Tensor

from dak_inductor.lowering.linear.counted_reads import count, counted_reads
from dak_inductor.lowering.linear.epilogue import finish

_linear = torch.ops.aten.linear.default


class StockProduct:
    """Calls of one product with the same weights. It counts what they read."""

    def __init__(self, weights: tuple[Tensor, ...], layout: str) -> None:
        self._counted = counted_reads(weights)
        self._in_out = layout == "in_out"

    def __call__(
        self,
        x: Tensor,
        weights: tuple[Tensor, ...],
        biases: tuple[Tensor | None, ...],
        residual: Tensor | None,
        activation: str,
    ) -> Tensor:
        """activation(x W^T + bias) (* (x up^T + bias)) + residual, as the stock composition rounds
        it.

        Args: as of `ring.run`.
        """
        count(self._counted, weights)
        if self._in_out:
            weights = tuple([weight.t() for weight in weights])
        outputs = [_linear(x, *factors) for factors in zip(weights, biases, strict=True)]
        return finish(outputs, activation, residual)
