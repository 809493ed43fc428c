"""A dak:: linear operator as a tiered product and the pointwise ops after it.

Inductor fuses those ops into the template as its epilogue, and computes them in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dak_inductor.lowering import residency  # noqa: F401  (registers the operators)
from dak_inductor.lowering.ops_linear import gated_linear_of, linear_epilogue_of

_aten = torch.ops.aten


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] times the transpose of weight [N, K], which is contiguous along N or K."""
    operand, layout = (weight, "out_in") if weight.stride(1) == 1 else (weight.t(), "in_out")
    record = torch.ops.dak.residency.default(operand)
    if x.dim() in (2, 3):
        return torch.ops.dak.tiered_mm.default(x, operand, record, layout)
    rows = _aten.reshape.default(x, [-1, x.shape[-1]])
    result = torch.ops.dak.tiered_mm.default(rows, operand, record, layout)
    return _aten.reshape.default(result, [*x.shape[:-1], weight.shape[0]])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    result = product(x, weight)
    return result if bias is None else _aten.add.Tensor(result, bias)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    return _linear(a, b.t(), bias)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    return product(a, b.t())


_EXPANSIONS: dict[str, Callable[..., Tensor]] = {
    "linear": _linear,
    "addmm": _addmm,
    "matmul": _matmul,
    "linear_epilogue": partial(linear_epilogue_of, _linear),
    "gated_linear": partial(gated_linear_of, _linear),
}


def expand(op_name: str, *args: Any, **kwargs: Any) -> Tensor:
    """What the call of dak::`op_name` computes, for a choice of "triton" by the registry."""
    return _EXPANSIONS[op_name](*args, **kwargs)
