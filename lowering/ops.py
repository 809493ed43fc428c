"""The dak:: operators: schema, shape function, CPU reference, and their stock equivalent.

Each operator computes what its stock equivalent computes, bit for bit on the CPU. On the CPU (the
simulated tier) it also counts the bytes that it reads from each tier. On CUDA a product with a
tiered weight and attention over a tiered cache go to a kernel that counts on the device; the
others, and what no kernel takes, run as their stock equivalent, which reads the tiered tensor
through its address.

The products are in `ops_linear`, attention is in `ops_attention`, writes to a KV cache are in
`ops_cache`; here are the rest:

    dak::embedding(weight [V, D], indices, padding_idx, ...)         -> [..., D]
    dak::gather(table [E, ...], indices) -> indices.shape + table.shape[1:]
    dak::grouped_mm(a, b [E, K, N], offs, bias, out_dtype)           -> as torch._grouped_mm
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dak_inductor.lowering.ops_cache  # noqa: F401  (registers torch.ops.dak.write_tokens)
from dak_inductor.lowering import reads
from dak_inductor.lowering.marks import MARKS
from dak_inductor.lowering.operator_record import Operator
from dak_inductor.lowering.ops_attention import ATTENTION_OPERATOR
from dak_inductor.lowering.ops_linear import LINEAR_OPERATORS

_aten = torch.ops.aten
_library = torch.library.Library("dak", "DEF")


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
    *LINEAR_OPERATORS,
    ATTENTION_OPERATOR,
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
    layout = (torch.Tag.flexible_layout,) if operator.any_strides else ()
    _library.define(operator.schema, tags=(torch.Tag.pt2_compliant_tag, *layout))

    def stock(*args: Any, **kwargs: Any) -> Tensor:
        return _unaliased(operator.stock(*args, **kwargs), args)

    def cpu(*args: Any, **kwargs: Any) -> Tensor:
        with MARKS.of_operands("simulated", args):
            operator.count(*args, **kwargs)
            return stock(*args, **kwargs)

    _library.impl(operator.name, cpu, "CPU")
    _library.impl(operator.name, _on_device(operator, stock), "CUDA")
    shape = operator.shape or stock
    torch.library.register_fake(f"dak::{operator.name}", shape, lib=_library)


def _on_device(operator: Operator, stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    kernel = operator.kernel

    def device(*args: Any, **kwargs: Any) -> Tensor:
        served = None if kernel is None else kernel(*args, **kwargs)
        if served is not None:
            return served
        with MARKS.of_operands("stock", args):
            if kernel is not None:
                operator.count(*args, **kwargs)
            return stock(*args, **kwargs)

    return device


def _unaliased(result: Tensor, args: tuple[Any, ...]) -> Tensor:
    """An operator without alias annotations must not return one of its inputs."""
    return result.clone() if any(result is arg for arg in args) else result


for _operator in OPERATORS:
    _register(_operator)
