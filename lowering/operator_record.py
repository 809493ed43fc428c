"""What the registration of a dak:: operator is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Operator:
    """One dak:: operator.

    stock:  computes it on any device, from ATen ops only, so that a trace can expand it.
    count:  records its reads: on the CPU always, on CUDA where `kernel` declined.
    kernel: serves it on CUDA, or returns None where it does not take the call; None where there is
            no kernel for the operator: the compiled graph then counts it by its operator table.
    shape:  the result without its values, for fake tensors; None: `stock` gives it.
    any_strides: a compiler need not copy operands to bring them into the strides that it traced.
    """

    name: str
    schema: str
    stock: Callable[..., Tensor]
    count: Callable[..., None]
    kernel: Callable[..., Tensor | None] | None = None
    shape: Callable[..., Tensor] | None = None
    any_strides: bool = False
