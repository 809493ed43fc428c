"""The two halves of a value along its last dimension, however they are cut."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import Node

from dak_inductor.normalise import value_of
from dak_inductor.sizes import shape_of

_aten = torch.ops.aten
_CUTS = (_aten.chunk.default, _aten.split.Tensor, _aten.split_with_sizes.default)


@dataclass(frozen=True, slots=True)
class Half:
    """`result` is one half of `whole`, `length` elements of the last dimension.

    `maker` is the node that reads `whole`: a cut into two, or `result` itself.
    """

    result: Node
    whole: Node
    maker: Node
    second: bool
    length: int


def half_of(node: object) -> Half | None:
    """Which half of which value this is; None for anything else."""
    if not isinstance(node, Node):
        return None
    if node.target is operator.getitem:
        cut, number = node.args
        if isinstance(cut, Node) and cut.target in _CUTS and number in (0, 1):
            return _half(node, cut, second=bool(number == 1))
    if node.target is _aten.slice.Tensor and len(node.args) > 2 and node.args[4:] in ((), (1,)):
        return _half(node, node, second=bool(node.args[2] not in (0, None)))
    if node.target is _aten.narrow.default:
        return _half(node, node, second=bool(node.args[2] != 0))
    return None


def _half(node: Node, maker: Node, *, second: bool) -> Half | None:
    whole = maker.args[0]
    assert isinstance(whole, Node)
    before, after = shape_of(value_of(whole)), shape_of(value_of(node))
    if not before or not isinstance(before[-1], int) or before[:-1] != after[:-1]:
        return None
    if 2 * after[-1] != before[-1] or not _starts_right(node, maker, second, after[-1]):
        return None
    return Half(node, whole, maker, second, after[-1])


def _starts_right(node: Node, maker: Node, second: bool, length: int) -> bool:
    """A slice of half the length might begin anywhere; a cut into two cannot."""
    if node is not maker:
        return True
    start = node.args[2]
    return start in ((length, -length) if second else (0, None))
