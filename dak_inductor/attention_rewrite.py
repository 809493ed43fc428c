"""Attention over a cache becomes dak::attention, in place, in a copy of a normalised graph."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import maybe_get_fake_mode
from torch.fx import Node
from torch.fx.node import map_arg

import dak_inductor.lowering.ops  # noqa: F401  (registers torch.ops.dak)
from dak_inductor.attention_calls import AttentionCall, read_attention
from dak_inductor.dead_nodes import erase_unused, is_pure
from dak_inductor.normalise import value_of
from dak_inductor.sizes import shape_of
from dak_inductor.views import VIEWS

_aten = torch.ops.aten


def write_attention(node: Node) -> None:
    """Make `node`, which `read_attention` reads, an operator dak::attention of the same name.

    What only the old spelling used is erased. The new result is stored otherwise than the old one,
    so views of it become reshapes.
    """
    call = read_attention(node)
    assert isinstance(call, AttentionCall)
    before = node.all_input_nodes
    depth = value_of(call.query).shape[3]
    with node.graph.inserting_before(node):
        arguments = (
            call.query,
            _first_tokens(call.key, call),
            _first_tokens(call.value, call),
            None,
            None,
            _mask(call),
            float(depth**-0.5 if call.scale is None else call.scale),
            call.causal,
            0,
            call.softcap,
        )
    node.target = torch.ops.dak.attention.default
    node.args, node.kwargs = arguments, {}
    node.meta.pop("tensor_meta", None)
    node.meta["val"] = _value(node)
    for operand in before:
        if not operand.users and is_pure(operand):
            erase_unused(operand)
    _reshape_views(node)


def write_update(node: Node) -> None:
    """Make an update of tokens of memory that is not row-major, as index_copy_ or index_put_, an
    operator dak::write_tokens; or an index_put_, where it is of something else.

    Inductor's decomposition of index_copy_ ends in a row-major copy of all of the memory, which for
    a cache that lies token by token is a copy of the cache per step.
    """
    update = _read_update(node)
    if update is None or value_of(update.memory).is_contiguous():
        return
    memory, index, source = update.memory, update.index, update.source
    if update.dimension == 2 and _is_tokens(value_of(memory), value_of(index), value_of(source)):
        node.replace_all_uses_with(memory)
        node.target, node.args = torch.ops.dak.write_tokens.default, (memory, index, source)
        node.meta = {k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta")}
    else:
        node.target = _aten.index_put_.default
        node.args = (memory, [*[None] * update.dimension, index], source)


@dataclass(frozen=True, slots=True)
class _Update:
    """`memory`, at `index` along `dimension`, becomes `source`."""

    memory: Node
    dimension: int
    index: Node
    source: Node


def _read_update(node: Node) -> _Update | None:
    if node.target is _aten.index_copy_.default:
        memory, dimension, index, source = node.args
        assert isinstance(dimension, int)
    elif node.target is _aten.index_put_.default and not any(node.args[3:]):
        memory, indices, source = node.args[:3]
        assert isinstance(indices, (list, tuple))
        found = [i for i, index in enumerate(indices) if index is not None]
        if len(found) != 1:
            return None
        dimension, index = found[0], indices[found[0]]
    else:
        return None
    assert isinstance(memory, Node) and isinstance(index, Node) and isinstance(source, Node)
    value = value_of(memory)
    if value.dim() == 0 or value_of(index).dim() != 1 or value_of(index).dtype == torch.bool:
        return None
    return _Update(memory, dimension % value.dim(), index, source)


def _is_tokens(memory: torch.Tensor, index: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether this is what dak::write_tokens takes, without broadcasts."""
    if memory.dim() != 4 or source.dim() != 4 or source.dtype != memory.dtype:
        return False
    wanted = (*shape_of(memory)[:2], shape_of(index)[0], shape_of(memory)[3])
    return shape_of(source) == wanted


def _first_tokens(operand: Node, call: AttentionCall) -> Node:
    if call.first is None:
        return operand
    return _new(operand, _aten.slice.Tensor, (operand, 2, 0, call.first))


def _mask(call: AttentionCall) -> Node | None:
    if call.mask is None or call.fill is None:
        return call.mask
    # float32, in which the number is what the graph has
    return _new(call.mask, _aten.where.Scalar, (call.mask, call.fill, 0.0))


def _new(like: Node, target: Any, arguments: tuple[Any, ...]) -> Node:
    """A node at the insertion point, with its value."""
    node = like.graph.create_node("call_function", target, arguments, {})
    node.meta["val"] = _value(node)
    return node


def _value(node: Node) -> Any:
    target: Any = node.target
    arguments = map_arg(node.args, value_of)
    first = next(value for value in arguments if isinstance(value, torch.Tensor))
    with maybe_get_fake_mode(first) or contextlib.nullcontext():
        return target(*arguments)


def _reshape_views(node: Node) -> None:
    for user in list(node.users):
        if user.target is _aten.view.default:
            user.target = _aten.reshape.default
        elif user.target not in VIEWS:
            continue
        _reshape_views(user)
