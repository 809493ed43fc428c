"""What follows the matrix products of one call, in the memory of the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_aten = torch.ops.aten

_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "silu": _aten.silu_.default,
    "gelu": _aten.gelu_.default,
    "gelu_tanh": lambda y: _aten.gelu_.default(y, approximate="tanh"),
}


def finish(outputs: Sequence[Tensor], activation: str, residual: Tensor | None) -> Tensor:
    """activation(first) (* second) + residual, of the shape of the first. Rounds where the stock
    composition does."""
    result = _IN_PLACE[activation](outputs[0])
    if len(outputs) == 2:
        result.mul_(outputs[1])
    if residual is not None:
        result.add_(residual.reshape(result.shape))
    return result
