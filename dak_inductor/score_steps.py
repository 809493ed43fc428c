"""What a graph does between the product of queries and keys and the product with the values.

    [scale] [softcap] [mask] [cast] softmax over the tokens [cast] [dropout outside of training]

in this order; everything else, and a mask before the scale, is no attention of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from dak_inductor.normalise import value_of
from dak_inductor.sizes import shape_of
from dak_inductor.views import SWAPS, changes_not

_aten = torch.ops.aten
_SOFTMAX = (_aten.softmax.int, _aten._softmax.default)
_MUL = (_aten.mul.Tensor, _aten.mul_.Tensor, _aten.mul.Scalar)
_DIV = (_aten.div.Tensor, _aten.div_.Tensor, _aten.div.Scalar)
_ADD = (_aten.add.Tensor, _aten.add_.Tensor)
_TANH = (_aten.tanh.default, _aten.tanh_.default)
_FILL = (_aten.masked_fill.Scalar, _aten.masked_fill_.Scalar)
_TRANSPOSED = ((2, 3), (3, 2), (-2, -1), (-1, -2))


@dataclass(frozen=True, slots=True)
class Scores:
    """Attention weights: softmax(softcap(query key^T * scale) + mask), `key` as [B, H, S, D].

    fill:           None, or what is put where `mask`, bool, is True.
    nodes:          all nodes from the product on, in graph order.
    used_elsewhere: one of them has another user than the next.
    """

    query: Node
    key: Node
    scale: float
    softcap: float
    mask: Node | None
    fill: float | None
    nodes: tuple[Node, ...]
    used_elsewhere: bool


def read_scores(weights: object) -> Scores | str | None:
    """How the weights were computed; None where by no softmax over a product; else the reason why
    it is none that is known."""
    steps: list[Node] = []

    def take(node: Node) -> object:
        steps.append(node)
        return node.args[0]

    value = weights
    while isinstance(value, Node) and (changes_not(value) or _casts(value)):
        value = take(value)
    if not isinstance(value, Node) or value.target not in _SOFTMAX or not _over_tokens(value):
        return None
    value = take(value)
    while isinstance(value, Node) and (changes_not(value) or _casts(value)):
        value = take(value)
    mask: Node | None = None
    fill: float | None = None
    if isinstance(value, Node) and value.target in _FILL:
        filled, number = value.args[1:3]
        if isinstance(filled, Node) and isinstance(number, (int, float)):
            mask, fill = filled, float(number)
            value = take(value)
    elif isinstance(value, Node) and value.target in _ADD and not value.kwargs:
        left, right = value.args[:2]
        if not isinstance(left, Node) or not isinstance(right, Node):
            return "a number is added to the attention scores"
        steps.append(value)
        # the scores are the operand that leads to a product
        value, mask = (left, right) if _product_behind(left) is not None else (right, left)
    softcap = 0.0
    outer = _factor(value)
    if outer is not None and isinstance(value, Node) and _is_tanh(value.args[0]):
        tanh = take(value)
        assert isinstance(tanh, Node)
        inside = take(tanh)
        inner = _factor(inside)
        if not isinstance(inside, Node) or inner is None or abs(inner * outer - 1) > 1e-6:
            return "a tanh of the attention scores that is no softcap"
        softcap = abs(outer)  # tanh is odd
        value = take(inside)
    scale = 1.0
    while isinstance(value, Node) and (
        (factor := _factor(value)) is not None or changes_not(value) or _casts(value)
    ):
        scale *= 1.0 if factor is None else factor
        value = take(value)
    if not isinstance(value, Node) or value.target not in (_aten.matmul.default,):
        return None if _product_behind(value) is None else _unknown_step(value)
    query, transposed = value.args[:2]
    key = _transposed(transposed)
    if not isinstance(query, Node) or key is None:
        return "the second operand of the attention scores is no transpose of keys"
    steps.append(value)
    used_elsewhere = any(len(step.users) != 1 for step in steps)
    nodes = tuple(reversed(steps))
    return Scores(query, key, scale, softcap, mask, fill, nodes, used_elsewhere)


def upwards(node: Node, *, through: tuple[object, ...]) -> Iterator[Node]:
    """`node`, and what it was made from through operators of these kinds and one beyond."""
    current: object = node
    while isinstance(current, Node) and current.op == "call_function":
        yield current
        if current.target not in through or not current.args:
            return
        current = current.args[0]


def _product_behind(value: object) -> Node | None:
    """The product that leads to a value through at most a few steps of one operand each."""
    for _ in range(8):
        if not isinstance(value, Node) or value.op != "call_function" or not value.args:
            return None
        if value.target in (_aten.matmul.default, _aten.bmm.default, _aten.baddbmm.default):
            return value
        value = value.args[0]
    return None


def _unknown_step(value: object) -> str:
    target = getattr(value, "target", None)
    return f"{target} between the attention scores and their softmax is not known"


def _casts(node: Node) -> bool:
    """A cast between floating dtypes; the softmax is computed in float32 in any case."""
    if node.target is not _aten.to.dtype:
        return False
    return bool(
        value_of(node.args[0]).dtype.is_floating_point and value_of(node).dtype.is_floating_point
    )


def _over_tokens(softmax: Node) -> bool:
    dimension = softmax.args[1]
    return dimension in (-1, len(shape_of(value_of(softmax))) - 1)


def _factor(value: object) -> float | None:
    """The number that a value is multiplied by, or None."""
    if not isinstance(value, Node) or len(value.args) != 2 or value.kwargs:
        return None
    number = value.args[1]
    if not isinstance(number, (int, float)) or isinstance(number, bool):
        return None
    if value.target in _MUL:
        return float(number)
    return 1.0 / number if value.target in _DIV and number else None


def _is_tanh(value: object) -> bool:
    return isinstance(value, Node) and value.target in _TANH


def _transposed(value: object) -> Node | None:
    """Keys [B, H, S, D] of which `value` is [B, H, D, S]."""
    if not isinstance(value, Node) or not isinstance(value.args[0] if value.args else None, Node):
        return None
    source = value.args[0]
    assert isinstance(source, Node)
    if value.target is _aten.mT.default:
        return source
    if value.target in SWAPS and tuple(value.args[1:]) in _TRANSPOSED:
        return source
    if value.target is _aten.permute.default and list(value.args[1:]) == [[0, 1, 3, 2]]:
        return source
    return None
