"""Products with a weight in a rewritten graph, seen through the steps that change nothing.

transformers puts dropouts of evaluation, casts to the same dtype and, around `addmm`, a view to two
dimensions and back between a product and what is done with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from dak_inductor.normalise import value_of
from dak_inductor.op_table import Op
from dak_inductor.sizes import Size, shape_of
from dak_inductor.views import SWAPS, changes_not, input_behind, written_between

_aten = torch.ops.aten
_dak = torch.ops.dak

Ops = Mapping[str, tuple[Op, ...]]
"""Entries of the operator table by name of the node; empty for an operator that is not ours."""


@dataclass(frozen=True, slots=True)
class Product:
    """`node` computes activation(x @ W^T + bias) from a weight that is a view of a graph input.

    `weight` is [N, K] in the layout "out_in", [K, N] in "in_out".
    """

    node: Node
    x: Node
    weight: Node
    bias: Node | None
    activation: str
    layout: str

    @property
    def operands(self) -> tuple[Node, ...]:
        """What the product reads."""
        return tuple(n for n in (self.x, self.weight, self.bias) if n is not None)


def shape(node: Node) -> tuple[Size, ...]:
    """Shape of a node's value, in the symbols of the graph; adds no guard."""
    return shape_of(value_of(node))


def product_behind(value: object, ops: Ops) -> Product | None:
    """The product that `value` shows, or None. Between the two, nothing is used twice.

    A view between them is taken where the input of the product was viewed the same way: the product
    of what was viewed is then the value itself.
    """
    steps = list(_upwards(value))
    if not steps or any(len(step.users) != 1 for step in steps[1:]):
        return None
    product = _read(steps[-1], ops)
    if product is None or not any(_reshapes(step) for step in steps):
        return product
    return _unviewed(product, shape(steps[0]))


def can_move(product: Product, to: Node) -> bool:
    """Whether the product may be computed just before `to` instead, which comes after it."""
    return not written_between(product.node, to, product.operands)


def _upwards(value: object) -> Iterator[Node]:
    """`value` and what it shows, up to the first node that computes something."""
    while isinstance(value, Node):
        yield value
        if not (changes_not(value) or _reshapes(value)):
            return
        value = value.args[0]


def _reshapes(node: object) -> bool:
    return isinstance(node, Node) and node.target in (_aten.view.default, _aten.reshape.default)


def _unviewed(product: Product, wanted: tuple[Size, ...]) -> Product | None:
    """The product with a result of the `wanted` shape, if its input had the leading dimensions."""
    if not _reshapes(product.x):
        return None
    x = product.x.args[0]
    assert isinstance(x, Node)
    if shape(x)[:-1] != wanted[:-1] or shape(x)[-1] != shape(product.x)[-1]:
        return None
    return replace(product, x=x) if wanted[-1] == shape(product.node)[-1] else None


def _read(node: Node, ops: Ops) -> Product | None:
    if len(ops.get(node.name, ())) != 1 or node.target not in _READERS:
        return None
    product = _READERS[node.target](node)
    if product is None or len(shape(product.weight)) != 2 or not shape(product.x):
        return None
    if input_behind(product.weight) is None:
        return None
    return _without_transposes(product)


def _linear(node: Node) -> Product | None:
    x, weight, bias = (*node.args, None)[:3]
    return _product(node, x, weight, bias, layout="out_in")


def _addmm(node: Node) -> Product | None:
    if any(factor != 1 for factor in (*node.args[3:], *node.kwargs.values())):
        return None
    bias, a, b = node.args[:3]
    return _product(node, a, b, bias, layout="in_out")


def _matmul(node: Node) -> Product | None:
    return _product(node, node.args[0], node.args[1], None, layout="in_out")


def _linear_epilogue(node: Node) -> Product | None:
    x, weight, bias, residual, activation, layout = node.args
    if residual is not None:
        return None
    product = _product(node, x, weight, bias, layout=layout)
    return None if product is None else replace(product, activation=str(activation))


def _product(node: Node, x: Any, weight: Any, bias: Any, *, layout: Any) -> Product | None:
    if bias is not None and shape(bias) != shape(node)[-1:]:
        return None
    return Product(node, x, weight, bias, "none", layout)


_READERS = {
    _dak.linear.default: _linear,
    _dak.addmm.default: _addmm,
    _dak.matmul.default: _matmul,
    _dak.linear_epilogue.default: _linear_epilogue,
}


def _without_transposes(product: Product) -> Product:
    """The same with the weight as it lies under any transposes."""
    weight, layout = product.weight, product.layout
    while _transposes(weight):
        weight = weight.args[0]  # type: ignore[assignment]
        layout = "in_out" if layout == "out_in" else "out_in"
    return replace(product, weight=weight, layout=layout)


def _transposes(node: Node) -> bool:
    if node.target in (_aten.t.default, _aten.numpy_T.default, _aten.mT.default):
        return len(shape(node)) == 2
    if node.target in SWAPS:
        return len(shape(node)) == 2 and set(node.args[1:]) in ({0, 1}, {-2, -1})
    return node.target is _aten.permute.default and list(node.args[1:]) == [[1, 0]]
