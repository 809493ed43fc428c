"""What a dak:: product is called with."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """Of activation(x W^T + bias) (* (x up^T + bias)) + residual, [..., N].

    x: [..., K].
    weights: one, or gate and up; [N, K] for layout "out_in", [K, N] for "in_out".
    biases: [N] or None for each weight.
    residual: [..., N] or None.
    """

    x: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    residual: Tensor | None
    activation: str
    layout: str

    def key(self) -> Hashable:
        """What tells two calls apart that may run in different ways, or at different costs. All
        that refusals ask is in it: where one is refused, so is the other."""
        x, weights, biases, residual, activation, layout = self
        return (
            tuple([(each.data_ptr(), each.shape, each.stride(), each.dtype) for each in weights]),
            x.shape,
            x.dtype,
            x.device,
            activation,
            layout,
            tuple([None if b is None else (b.data_ptr(), b.shape, b.dtype) for b in biases]),
            None if residual is None else (residual.shape, residual.dtype, residual.device),
        )
