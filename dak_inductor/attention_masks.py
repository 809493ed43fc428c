"""Masks of attention that keep torch from its fast kernels: those of all True, and broadcast ones.

transformers leaves out a mask that masks nothing, but not under torch.compile, where it is
`arange(tokens) >= 0` spread over all keys. With any mask torch does without flash attention, and
with one whose last dimension has stride 0 without memory-efficient attention too: what is left is
softmax(QK^T)V, spelled out and in fp32.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from dak_inductor.dead_nodes import erase_unused
from dak_inductor.normalise import value_of
from dak_inductor.views import memory_behind
from dak_inductor.written_inputs import written_memory

_aten = torch.ops.aten
_SDPA = _aten.scaled_dot_product_attention.default
_MASK = 3

Bound = int | None
"""All elements are at least that; None where nothing is known. True is 1."""


def mend_masks(graph_module: GraphModule) -> None:
    """Drop masks that are all True by the graph alone, whatever its inputs; lay others out densely
    where their last dimension is broadcast. In place."""
    bounds = _Bounds(graph_module)
    changed = False
    for node in graph_module.graph.find_nodes(op="call_function", target=_SDPA):
        mask = node.args[_MASK] if len(node.args) > _MASK else node.kwargs.get("attn_mask")
        value = value_of(mask)
        if not isinstance(mask, Node) or not isinstance(value, torch.Tensor):
            continue
        if value.dtype == torch.bool and (bounds.of(mask) or 0) >= 1:
            _replace(node, mask, None)
            erase_unused(mask)
            changed = True
        elif _is_broadcast(value):
            with graph_module.graph.inserting_before(node):
                dense = graph_module.graph.call_function(
                    _aten.clone.default, (mask,), {"memory_format": torch.contiguous_format}
                )
            dense.meta = {**mask.meta, "val": value.contiguous()}
            _replace(node, mask, dense)
            changed = True
    if changed:
        graph_module.recompile()


def _replace(node: Node, mask: Node, other: Node | None) -> None:
    def chosen(each: Node) -> Node | None:
        return other if each is mask else each

    node.args, node.kwargs = map_arg(node.args, chosen), map_arg(node.kwargs, chosen)


def _is_broadcast(mask: torch.Tensor) -> bool:
    return bool(mask.dim() and mask.stride(-1) == 0 and mask.shape[-1] != 1)


class _Bounds:
    """What nodes are at least; of what the graph writes to nothing is known."""

    def __init__(self, graph_module: GraphModule) -> None:
        self._known: dict[Node, Bound] = {}
        self._written = written_memory(graph_module)

    def of(self, node: object) -> Bound:
        """Of a tensor or a number; a number that a call decides is unknown."""
        if isinstance(node, (bool, int)):
            return int(node)
        if not isinstance(node, Node):
            return None
        if node not in self._known:
            rule = _RULES.get(node.target)
            unknown = rule is None or memory_behind(node) in self._written
            self._known[node] = None if unknown or rule is None else rule(node, self.of)
        return self._known[node]


_Of = Callable[[object], Bound]
_Rule = Callable[[Node, _Of], Bound]


def _same(node: Node, of: _Of) -> Bound:
    """The same elements, or some of them."""
    return of(node.args[0])


def _converted(node: Node, of: _Of) -> Bound:
    """To bool, to an integer that may hold fewer values, or to the same."""
    bound, after = of(node.args[0]), value_of(node).dtype
    if bound is None or after.is_floating_point or after.is_complex:
        return None
    if after == torch.bool:
        return 1 if bound >= 1 else 0
    before = value_of(node.args[0]).dtype
    return bound if before in (torch.bool, after) else None


def _arange(node: Node, of: _Of) -> Bound:
    start, step = 0, 1
    if node.target is not _aten.arange.default:
        start = node.args[0]  # type: ignore[assignment]
    if node.target is _aten.arange.start_step and len(node.args) > 2:
        step = node.args[2]  # type: ignore[assignment]
    known = isinstance(start, int) and isinstance(step, int) and step > 0
    return start if known and not value_of(node).dtype.is_floating_point else None


def _sum(node: Node, of: _Of) -> Bound:
    left, right = (of(each) for each in node.args[:2])
    scaled = node.kwargs.get("alpha", 1) != 1
    if left is None or right is None or scaled or value_of(node).dtype != torch.int64:
        return None  # smaller integers may wrap around
    return left + right


def _filled(value: int) -> _Rule:
    return lambda node, of: value


def _full(node: Node, of: _Of) -> Bound:
    value = of(node.args[1])
    integral = not value_of(node).dtype.is_floating_point
    return value if integral else None


def _compared(holds: Callable[[int, int], bool]) -> _Rule:
    def rule(node: Node, of: _Of) -> Bound:
        left, right = of(node.args[0]), node.args[1]
        return int(left is not None and isinstance(right, int) and holds(left, right))

    return rule


def _combined(choose: Callable[[Iterable[int]], int]) -> _Rule:
    def rule(node: Node, of: _Of) -> Bound:
        return choose(of(each) or 0 for each in node.args[:2]) if _of_bools(node) else None

    return rule


def _of_bools(node: Node) -> bool:
    return all(
        isinstance(each, Node) and value_of(each).dtype == torch.bool for each in node.args[:2]
    )


_RULES: Mapping[Any, _Rule] = {
    **dict.fromkeys((_aten.arange.default, _aten.arange.start, _aten.arange.start_step), _arange),
    **dict.fromkeys((_aten.ones.default, _aten.new_ones.default, _aten.ones_like.default),
                    _filled(1)),
    **dict.fromkeys((_aten.zeros.default, _aten.new_zeros.default, _aten.zeros_like.default),
                    _filled(0)),
    _aten.full.default: _full,
    **dict.fromkeys((_aten.unsqueeze.default, _aten.squeeze.dim, _aten.expand.default,
                     _aten.view.default, _aten.reshape.default, _aten.transpose.int,
                     _aten.permute.default, _aten.slice.Tensor, _aten.select.int,
                     _aten.alias.default, _aten.clone.default, _aten.contiguous.default,
                     _aten.lift_fresh_copy.default), _same),
    **dict.fromkeys((_aten.to.dtype, _aten.to.dtype_layout, _aten.to.device,
                     _aten._to_copy.default), _converted),
    **dict.fromkeys((_aten.add.Tensor, _aten.add.Scalar), _sum),
    _aten.ge.Scalar: _compared(operator.ge),
    _aten.gt.Scalar: _compared(operator.gt),
    **dict.fromkeys((_aten.__and__.Tensor, _aten.bitwise_and.Tensor, _aten.logical_and.default),
                    _combined(min)),
    **dict.fromkeys((_aten.__or__.Tensor, _aten.bitwise_or.Tensor, _aten.logical_or.default),
                    _combined(max)),
}  # fmt: skip
