"""One rule per ATen operator: which operand could be tiered, what it costs, or why it is refused.

A rule sees one node of a normalised graph and returns a `Match`, the reason of a refusal in the
user's words, or None where the op has nothing to do with weights or caches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

import dak_inductor.lowering.ops  # noqa: F401  (registers torch.ops.dak)
from dak_inductor.attention_calls import AttentionCall, attention_of_scores, read_attention
from dak_inductor.attention_match import attention_in_place, attention_operator, over_cache
from dak_inductor.normalise import value_of
from dak_inductor.op_match import Match, Read, dtype_name, nbytes
from dak_inductor.provenance import parameter_name
from dak_inductor.sizes import add, minimum, product, shape_of
from dak_inductor.views import cache_behind, input_behind, updated_in_place

_aten = torch.ops.aten
COMPUTED = "both operands are computed in the graph; nothing in it can be tiered"
ON_THE_LEFT = (
    "the weight is on the left, or was not offloaded when this was compiled, and transposing the "
    "activation and the result would take copies; its stock kernel reads the weight"
)

Rule = Callable[[Node], Match | str | None]


def _argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def _contraction(kind: str, node: Node, x: Any, weight: Any) -> Match | str:
    """A product of `x` [..., K] with `weight`, whichever layout it has; rows of x are M."""
    source = input_behind(weight)
    if source is None:
        return COMPUTED
    x_value, result = value_of(x), value_of(node)
    if result.dtype != value_of(weight).dtype and not result.dtype.is_floating_point:
        return f"operands of {value_of(weight).dtype} give {result.dtype}"
    contracted, columns = shape_of(x_value)[-1], shape_of(result)[-1:]
    return Match(
        kind=kind,
        reads=(Read.of(weight, source),),
        m=product(shape_of(x_value)[:-1]),
        other=add(nbytes(x_value), nbytes(result)),
        flops=product((2, *shape_of(result), contracted)),
        dtype=dtype_name(value_of(weight).dtype),
        n=columns[0] if value_of(weight).dim() == 2 else 0,
    )


def _linear(node: Node) -> Match | str:
    return _contraction("linear", node, node.args[0], node.args[1])


def _addmm(node: Node) -> Match | str | None:
    return _either("addmm", node, node.args[1], node.args[2])


def _matmul(node: Node) -> Match | str | None:
    return _either("matmul", node, node.args[0], node.args[1])


def _either(kind: str, node: Node, left: Any, right: Any) -> Match | str | None:
    """A product of which the right operand is the weight, else the left one; or attention."""
    if value_of(left).dim() == 0 or value_of(right).dim() == 0:
        return "a scalar operand"
    call = read_attention(node)
    if isinstance(call, AttentionCall) and (attention := over_cache(call)) is not None:
        return attention
    if call is None:
        call = attention_of_scores(node)
        if isinstance(call, AttentionCall) and over_cache(call) is not None:
            return None  # the product with the values stands for both
    if _weight_like(right) and not (_is_parameter(left) and not _is_parameter(right)):
        return _contraction(kind, node, left, right)
    if _weight_like(left):
        match = _contraction(kind, node, right, left)
        if isinstance(match, str):
            return match
        # the weight is on the left: M counts the columns of the right operand
        right_shape = shape_of(value_of(right))
        columns = right_shape[-1] if len(right_shape) > 1 else 1
        depth = shape_of(value_of(left))[-1]
        flops = product((2, *shape_of(value_of(node)), depth))
        return Match(
            kind,
            match.reads,
            columns,
            match.other,
            flops,
            match.dtype,
            rewrite=not _is_parameter(left),
            refusal=ON_THE_LEFT if _is_parameter(left) else "",
            n=shape_of(value_of(left))[0] if value_of(left).dim() == 2 else 0,
        )
    for activation, operand in ((left, right), (right, left)):
        cache = cache_behind(operand)
        if cache is not None and value_of(cache).dim() >= 3:
            reason = call if isinstance(call, str) else ""
            return _cached(node, activation, operand, cache, reason)
    return None


def _weight_like(node: Any) -> bool:
    """A view of a graph input that the graph does not update in place."""
    source = input_behind(node)
    if source is None:
        return False
    return not updated_in_place(source)


def _is_parameter(node: Any) -> bool:
    """A weight for certain: an activation may be a graph input as well."""
    source = input_behind(node)
    return source is not None and _weight_like(node) and bool(parameter_name(source))


def _cached(node: Node, activation: Node, view: Node, cache: Node, refusal: str) -> Match:
    """One of the two products that attention is spelled with; the stock op reads the cache."""
    x_value, result = value_of(activation), value_of(node)
    return Match(
        kind="attention",
        reads=(Read.of(view, cache),),
        m=shape_of(x_value)[-2] if x_value.dim() > 1 else 1,
        other=add(nbytes(x_value), nbytes(result)),
        flops=product((2, *shape_of(result), shape_of(x_value)[-1])),
        dtype=dtype_name(result.dtype),
        rewrite=False,
        refusal=refusal,
    )


def _embedding(node: Node) -> Match | str:
    return _rows("embedding", node, node.args[0], node.args[1])


def _gather(node: Node) -> Match | str | None:
    if not _weight_like(node.args[0]):
        return None
    indices = _argument(node, 1, "indices")
    if len(indices) != 1 or indices[0] is None or value_of(indices[0]).dtype == torch.bool:
        return "only one integer index on the leading dimension is gathered"
    return _rows("gather", node, node.args[0], indices[0])


def _index_select(node: Node) -> Match | str | None:
    if not _weight_like(node.args[0]):
        return None
    if _argument(node, 1, "dim") != 0:
        return "rows are selected on another dimension than the first"
    if value_of(node.args[0]).dim() == 0 or value_of(node.args[2]).dim() == 0:
        return "a table or an index without dimensions"
    return _rows("gather", node, node.args[0], node.args[2])


def _rows(kind: str, node: Node, table: Any, indices: Any) -> Match | str:
    """Some rows of a table: at most as many as there are indices."""
    if not _weight_like(table):
        return "the table is computed in the graph"
    source = input_behind(table)
    assert source is not None
    value = value_of(table)
    rows = product(shape_of(value_of(indices)))
    shape = shape_of(value)
    touched = product((minimum(rows, shape[0]), *shape[1:], value.element_size()))
    return Match(
        kind, (Read(source, touched),), rows, nbytes(value_of(node)), 0, dtype_name(value.dtype)
    )


def _grouped_mm(node: Node) -> Match | str:
    x, weight = node.args[0], node.args[1]
    if not _weight_like(weight):
        return COMPUTED
    source = input_behind(weight)
    assert source is not None
    value, x_value = value_of(weight), value_of(x)
    shape = shape_of(value)
    rows = product(shape_of(x_value)[:-1])
    experts = minimum(rows, shape[0]) if len(shape) == 3 else 1
    inner = shape[1:] if len(shape) == 3 else shape
    touched = product((experts, *inner, value.element_size()))
    return Match(
        kind="grouped_mm",
        reads=(Read(source, touched),),
        m=rows,
        other=add(nbytes(x_value), nbytes(value_of(node))),
        flops=product((2, *shape_of(value_of(node)), shape_of(x_value)[-1])),
        dtype=dtype_name(value.dtype),
    )


RULES: dict[Any, Rule] = {
    _aten.linear.default: _linear,
    _aten.addmm.default: _addmm,
    _aten.mm.default: _matmul,
    _aten.bmm.default: _matmul,
    _aten.matmul.default: _matmul,
    _aten.scaled_dot_product_attention.default: attention_operator,
    _aten.embedding.default: _embedding,
    _aten.index.Tensor: _gather,
    _aten.index_select.default: _index_select,
    _aten._grouped_mm.default: _grouped_mm,
    torch.ops.dak.attention.default: attention_in_place,
}
