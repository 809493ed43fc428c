"""Activation functions in a graph, whole or written out in their arithmetic.

transformers spells GELU's tanh form as one operator (gemma) or as eight (gpt2's NewGELU); the
written-out forms are matched as expression trees, with either order of every product and sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from dak_inductor.normalise import value_of

_aten = torch.ops.aten

Pattern: TypeAlias = Any
"""X, a number, or (operator, pattern, ...)."""

X = "x"
_SCALE = math.sqrt(2 / math.pi)
_CUBIC = ("mul", ("add", X, ("mul", ("pow", X, 3.0), 0.044715)), _SCALE)
_HORNER = ("mul", ("mul", X, _SCALE), ("add", ("mul", ("mul", X, 0.044715), X), 1.0))

_WRITTEN_OUT: tuple[tuple[str, Pattern], ...] = (
    ("silu", ("mul", X, ("sigmoid", X))),
    ("gelu", ("mul", ("mul", X, 0.5), ("add", ("erf", ("div", X, math.sqrt(2))), 1.0))),
    ("gelu", ("mul", ("mul", X, 0.5), ("add", ("erf", ("mul", X, math.sqrt(0.5))), 1.0))),
    ("gelu_tanh", ("mul", ("mul", X, 0.5), ("add", ("tanh", _CUBIC), 1.0))),
    ("gelu_tanh", ("mul", ("mul", X, 0.5), ("add", ("tanh", _HORNER), 1.0))),
)

_NAMES: dict[Any, str] = {
    _aten.mul.Tensor: "mul",
    _aten.mul.Scalar: "mul",
    _aten.add.Tensor: "add",
    _aten.add.Scalar: "add",
    _aten.div.Tensor: "div",
    _aten.pow.Tensor_Scalar: "pow",
    _aten.tanh.default: "tanh",
    _aten.erf.default: "erf",
    _aten.sigmoid.default: "sigmoid",
}
_COMMUTATIVE = ("mul", "add")


@dataclass(frozen=True, slots=True)
class Activation:
    """`name` of the function applied to `source`; `nodes` compute it, its result first."""

    name: str
    source: Node
    nodes: tuple[Node, ...]


def activation_of(node: object) -> Activation | None:
    """The activation that ends at `node`, if one of which nothing inside is used elsewhere."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    if node.target is _aten.silu.default:
        return Activation("silu", _first(node), (node,))
    if node.target is _aten.gelu.default:
        tanh = node.kwargs.get("approximate", "none") == "tanh"
        return Activation("gelu_tanh" if tanh else "gelu", _first(node), (node,))
    if _NAMES.get(node.target) != "mul":
        return None
    for name, pattern in _WRITTEN_OUT:
        for source, nodes in _matches(pattern, node, None):
            if source is not None and _closed(source, nodes):
                return Activation(name, source, tuple(dict.fromkeys(nodes)))
    return None


def _first(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _closed(source: Node, nodes: tuple[Node, ...]) -> bool:
    """No step is used outside, and every step is computed in the dtype of the source."""
    inside = set(nodes)
    dtype = value_of(source).dtype
    return all(value_of(step).dtype == dtype for step in nodes) and all(
        set(step.users) <= inside for step in nodes[1:]
    )


def _matches(
    pattern: Pattern, value: object, source: Node | None
) -> Iterator[tuple[Node | None, tuple[Node, ...]]]:
    """Each way in which `value` is the pattern: what X stands for, and the steps inside."""
    if pattern is X:
        if isinstance(value, Node) and source in (None, value):
            yield value, ()
        return
    if isinstance(pattern, float):
        if isinstance(value, (int, float)) and math.isclose(value, pattern, rel_tol=1e-6):
            yield source, ()
        return
    if not isinstance(value, Node) or _NAMES.get(value.target) != pattern[0]:
        return
    if len(value.args) != len(pattern) - 1 or any(v != 1 for v in value.kwargs.values()):
        return
    orders = [pattern[1:]]
    if pattern[0] in _COMMUTATIVE:
        orders.append(pattern[:0:-1])
    for order in orders:
        yield from _operands(order, value.args, source, (value,))


def _operands(
    patterns: tuple[Pattern, ...],
    values: tuple[object, ...],
    source: Node | None,
    nodes: tuple[Node, ...],
) -> Iterator[tuple[Node | None, tuple[Node, ...]]]:
    if not patterns:
        yield source, nodes
        return
    for found, steps in _matches(patterns[0], values[0], source):
        yield from _operands(patterns[1:], values[1:], found, (*nodes, *steps))
