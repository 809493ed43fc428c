"""The dak:: operators: schema, shape function, CPU reference, and their stock equivalent.

Each operator computes what its stock equivalent computes, bit for bit. On the CPU (the simulated
tier) it also counts the bytes that it reads from each tier. On CUDA the registry may replace it by
a template; where no template fits, the stock equivalent reads the tiered tensor through its
address.

    dak::linear(x [..., K], weight [N, K], bias [N]?)                -> [..., N]
    dak::addmm(bias, a [M, K], b [K, N], beta, alpha)                -> [M, N]
    dak::matmul(a, b)                                                -> as torch.matmul
    dak::embedding(weight [V, D], indices, padding_idx, ...)         -> [..., D]
    dak::gather(table [E, ...], indices) -> indices.shape + table.shape[1:]
    dak::grouped_mm(a, b [E, K, N], offs, bias, out_dtype)           -> as torch._grouped_mm
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dak_inductor.lowering import reads

_aten = torch.ops.aten
_library = torch.library.Library("dak", "DEF")


@dataclass(frozen=True, slots=True)
class Operator:
    """One dak:: operator. `stock` computes it on any device; `count` records its reads on the
    CPU."""

    name: str
    schema: str
    stock: Callable[..., Tensor]
    count: Callable[..., None]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _aten.linear.default(x, weight, bias)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    return _aten.addmm.default(bias, a, b, beta=beta, alpha=alpha)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    return _aten.matmul.default(a, b)


def _embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    return _aten.embedding.default(weight, indices, padding_idx, scale_grad_by_freq, sparse)


def _gather(table: Tensor, indices: Tensor) -> Tensor:
    return _aten.index.Tensor(table, [indices])


def _grouped_mm(
    a: Tensor,
    b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return _aten._grouped_mm.default(a, b, offs, bias, out_dtype)


def _count_grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any) -> None:
    if offs is None or b.dim() != 3:
        reads.count_dense("grouped_mm", b)
        return
    sizes = torch.diff(offs, prepend=offs.new_zeros(1))
    reads.count_rows("grouped_mm", b, torch.nonzero(sizes).flatten())


OPERATORS: tuple[Operator, ...] = (
    Operator(
        "linear",
        "linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
        _linear,
        lambda x, weight, bias=None: reads.count_dense("linear", weight),
    ),
    Operator(
        "addmm",
        "addmm(Tensor bias, Tensor a, Tensor b, Scalar beta=1, Scalar alpha=1) -> Tensor",
        _addmm,
        lambda bias, a, b, beta=1, alpha=1: reads.count_dense("addmm", a, b),
    ),
    Operator(
        "matmul",
        "matmul(Tensor a, Tensor b) -> Tensor",
        _matmul,
        lambda a, b: reads.count_dense("matmul", a, b),
    ),
    Operator(
        "embedding",
        "embedding(Tensor weight, Tensor indices, SymInt padding_idx=-1, "
        "bool scale_grad_by_freq=False, bool sparse=False) -> Tensor",
        _embedding,
        lambda weight, indices, *_: reads.count_rows("embedding", weight, indices),
    ),
    Operator(
        "gather",
        "gather(Tensor table, Tensor indices) -> Tensor",
        _gather,
        lambda table, indices: reads.count_rows("gather", table, indices),
    ),
    Operator(
        "grouped_mm",
        "grouped_mm(Tensor a, Tensor b, Tensor? offs=None, Tensor? bias=None, "
        "ScalarType? out_dtype=None) -> Tensor",
        _grouped_mm,
        _count_grouped_mm,
    ),
)


def _register(operator: Operator) -> None:
    _library.define(operator.schema, tags=(torch.Tag.pt2_compliant_tag,))
    stock, count = operator.stock, operator.count

    def cpu(*args: Any, **kwargs: Any) -> Tensor:
        count(*args, **kwargs)
        return _unaliased(stock(*args, **kwargs), args)

    def device(*args: Any, **kwargs: Any) -> Tensor:
        return _unaliased(stock(*args, **kwargs), args)

    _library.impl(operator.name, cpu, "CPU")
    _library.impl(operator.name, device, "CUDA")
    torch.library.register_fake(f"dak::{operator.name}", device, lib=_library)


def _unaliased(result: Tensor, args: tuple[Any, ...]) -> Tensor:
    """An operator without alias annotations must not return one of its inputs."""
    return result.clone() if any(result is arg for arg in args) else result


for _operator in OPERATORS:
    _register(_operator)
