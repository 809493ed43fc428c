"""One product y[M, N] = activation(x[M, K] W^T + bias) (* up) + residual, as the kernel sees it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

from dak_inductor.lowering.element_types import ELEMENT_BYTES


class Activation(IntEnum):
    """Numbers as in kernels/linear/arguments.cuh."""

    NONE = 0
    SILU = 1
    GELU = 2
    GELU_TANH = 3


@dataclass(frozen=True, slots=True)
class LinearProblem:
    """Sizes in elements. `n` is the width of the result; a gated product has two weights of n rows.

    `in_out`: weights are stored [K, N], else [N, K].
    """

    m: int
    n: int
    k: int
    dtype: torch.dtype
    gated: bool = False
    in_out: bool = False

    @property
    def weight_bytes(self) -> int:
        return self.n * self.k * ELEMENT_BYTES * (2 if self.gated else 1)

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k * (2 if self.gated else 1)
