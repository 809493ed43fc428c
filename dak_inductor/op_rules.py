"""One rule per ATen operator: which operand could be tiered, what it costs, or why it is refused.

A rule sees one node of a normalised graph and returns a `Match`, the reason of a refusal in the
user's words, or None where the op has nothing to do with weights or caches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from dak_inductor.normalise import value_of
from dak_inductor.sizes import Size, minimum, product, shape_of
from dak_inductor.views import cache_behind, input_behind

_aten = torch.ops.aten
COMPUTED = "both operands are computed in the graph; nothing in it can be tiered"


@dataclass(frozen=True, slots=True)
class Read:
    """`touched` bytes of graph input `source`, read per call."""

    source: Node
    touched: Size

    @classmethod
    def of(cls, operand: Node, source: Node) -> Read:
        """A read of every element of `operand`, a view of `source`; an expanded view is read
        once."""
        value = value_of(operand)
        whole = value_of(source)
        touched = minimum(nbytes(value), nbytes(whole))
        return cls(source, touched)


@dataclass(frozen=True, slots=True)
class Match:
    """What a rule found. `reads` holds the operands that lie behind graph inputs, weights first."""

    kind: str
    reads: tuple[Read, ...]
    m: Size
    other: Size
    flops: Size
    dtype: str
    rewrite: bool = True


Rule = Callable[[Node], Match | str | None]


def nbytes(tensor: torch.Tensor) -> Size:
    """Bytes of all elements of a (fake) tensor."""
    return product((*shape_of(tensor), tensor.element_size()))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _nodes(node: Node, count: int) -> list[Any]:
    return list(node.args[:count])


def _argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def _contraction(kind: str, node: Node, x: Node, weight: Node) -> Match | str:
    """A product of `x` [..., K] with `weight`, whichever layout it has; rows of x are M."""
    source = input_behind(weight)
    if source is None:
        return COMPUTED
    x_value, result = value_of(x), value_of(node)
    if result.dtype != value_of(weight).dtype and not result.dtype.is_floating_point:
        return f"operands of {value_of(weight).dtype} give {result.dtype}"
    contracted = shape_of(x_value)[-1]
    return Match(
        kind=kind,
        reads=(Read.of(weight, source),),
        m=product(shape_of(x_value)[:-1]),
        other=_sum(nbytes(x_value), nbytes(result)),
        flops=product((2, *shape_of(result), contracted)),
        dtype=_name(value_of(weight).dtype),
    )


def _sum(left: Size, right: Size) -> Size:
    return left + right


def _linear(node: Node) -> Match | str:
    x, weight = _nodes(node, 2)
    return _contraction("linear", node, x, weight)


def _addmm(node: Node) -> Match | str | None:
    return _either("addmm", node, node.args[1], node.args[2])


def _matmul(node: Node) -> Match | str | None:
    return _either("matmul", node, node.args[0], node.args[1])


def _either(kind: str, node: Node, left: Any, right: Any) -> Match | str | None:
    """A product of which the right operand is the weight, else the left one."""
    if value_of(left).dim() == 0 or value_of(right).dim() == 0:
        return "a scalar operand"
    if _weight_like(right):
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
        return Match(kind, match.reads, columns, match.other, flops, match.dtype)
    for activation, operand in ((left, right), (right, left)):
        cache = cache_behind(operand)
        if cache is not None and value_of(cache).dim() >= 3:
            return _cached(node, activation, operand, cache)
    return None


def _weight_like(node: Any) -> bool:
    """A view of a graph input that the graph does not update in place."""
    source = input_behind(node)
    if source is None:
        return False
    return not any(_updates(user) for user in source.users)


def _updates(user: Node) -> bool:
    name = getattr(user.target, "__name__", "")
    return user.op == "call_function" and name.split(".")[0].endswith("_")


def _cached(node: Node, activation: Node, cache_view: Node, cache: Node) -> Match:
    """Attention spelled as matmuls: the operand is a cache that the graph updates; the stock op
    reads it."""
    x_value, result = value_of(activation), value_of(node)
    return Match(
        kind="attention",
        reads=(Read.of(cache_view, cache),),
        m=shape_of(x_value)[-2] if x_value.dim() > 1 else 1,
        other=_sum(nbytes(x_value), nbytes(result)),
        flops=product((2, *shape_of(result), shape_of(x_value)[-1])),
        dtype=_name(result.dtype),
        rewrite=False,
    )


def _attention(node: Node) -> Match | str:
    query, key, value = (value_of(argument) for argument in node.args[:3])
    reads = tuple(
        Read.of(argument, source)
        for argument in node.args[1:3]
        if isinstance(argument, Node) and (source := cache_behind(argument)) is not None
    )
    if not reads:
        return "keys and values are computed in the graph; there is no cache to tier"
    query_shape, key_shape = shape_of(query), shape_of(key)
    depth = _sum(query_shape[-1], shape_of(value)[-1])
    return Match(
        kind="attention",
        reads=reads,
        m=query_shape[-2],
        other=_sum(nbytes(query), nbytes(value_of(node))),
        flops=product((2, *query_shape[:-1], key_shape[-2], depth)),
        dtype=_name(query.dtype),
        rewrite=False,
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
        kind, (Read(source, touched),), rows, nbytes(value_of(node)), 0, _name(value.dtype)
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
        other=_sum(nbytes(x_value), nbytes(value_of(node))),
        flops=product((2, *shape_of(value_of(node)), shape_of(x_value)[-1])),
        dtype=_name(value.dtype),
    )


RULES: dict[Any, Rule] = {
    _aten.linear.default: _linear,
    _aten.addmm.default: _addmm,
    _aten.mm.default: _matmul,
    _aten.bmm.default: _matmul,
    _aten.matmul.default: _matmul,
    _aten.scaled_dot_product_attention.default: _attention,
    _aten.embedding.default: _embedding,
    _aten.index.Tensor: _gather,
    _aten.index_select.default: _index_select,
    _aten._grouped_mm.default: _grouped_mm,
}
