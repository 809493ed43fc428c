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


class _Chain:
    """The way back from attention weights to a product; `steps` are the nodes behind `value`."""

    def __init__(self, value: object) -> None:
        self.value = value
        self.steps: list[Node] = []

    def pass_one(self, operand: object = None) -> None:
        """Go on to the first operand of `value`, a node, or to another one."""
        assert isinstance(self.value, Node)
        self.steps.append(self.value)
        self.value = self.value.args[0] if operand is None else operand

    def pass_casts(self) -> None:
        while isinstance(self.value, Node) and (changes_not(self.value) or _casts(self.value)):
            self.pass_one()


def read_scores(weights: object) -> Scores | str | None:
    """How the weights were computed; None where by no softmax over a product; else the reason why
    it is none that is known."""
    chain = _Chain(weights)
    chain.pass_casts()
    softmax = chain.value
    if not isinstance(softmax, Node) or softmax.target not in _SOFTMAX or not _over_tokens(softmax):
        return None
    chain.pass_one()
    chain.pass_casts()
    masked = _pass_mask(chain)
    if isinstance(masked, str):
        return masked
    softcap = _pass_softcap(chain)
    if isinstance(softcap, str):
        return softcap
    scale = _pass_scale(chain)
    product = chain.value
    if not isinstance(product, Node) or product.target is not _aten.matmul.default:
        return None if _product_behind(product) is None else _unknown_step(product)
    query, transposed = product.args[:2]
    key = _transposed(transposed)
    if not isinstance(query, Node) or key is None:
        return "the second operand of the attention scores is no transpose of keys"
    chain.pass_one()
    used_elsewhere = any(len(step.users) != 1 for step in chain.steps)
    return Scores(query, key, scale, softcap, *masked, tuple(reversed(chain.steps)), used_elsewhere)


def _pass_mask(chain: _Chain) -> tuple[Node | None, float | None] | str:
    """`mask` and `fill` of the scores, if there is a mask; a text where something else is added."""
    masked = chain.value
    if not isinstance(masked, Node):
        return None, None
    if masked.target in _FILL:
        mask, number = masked.args[1:3]
        if isinstance(mask, Node) and isinstance(number, (int, float)):
            chain.pass_one()
            return mask, float(number)
    elif masked.target in _ADD and not masked.kwargs:
        left, right = masked.args[:2]
        if not isinstance(left, Node) or not isinstance(right, Node):
            return "a number is added to the attention scores"
        # the scores are the operand that leads to a product
        scores, mask = (left, right) if _product_behind(left) is not None else (right, left)
        chain.pass_one(scores)
        return mask, None
    return None, None


def _pass_softcap(chain: _Chain) -> float | str:
    """The bound of the scores, 0 for none; a text where they go through another tanh."""
    outer = _factor(chain.value)
    if outer is None or not isinstance(chain.value, Node) or not _is_tanh(chain.value.args[0]):
        return 0.0
    chain.pass_one()
    chain.pass_one()
    inner = _factor(chain.value)
    if inner is None or abs(inner * outer - 1) > 1e-6:
        return "a tanh of the attention scores that is no softcap"
    chain.pass_one()
    return abs(outer)  # tanh is odd


def _pass_scale(chain: _Chain) -> float:
    """What the product was multiplied by."""
    scale = 1.0
    while isinstance(chain.value, Node):
        factor = _factor(chain.value)
        if factor is None and not changes_not(chain.value) and not _casts(chain.value):
            break
        scale *= 1.0 if factor is None else factor
        chain.pass_one()
    return scale


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
