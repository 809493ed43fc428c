"""Attention over a cache becomes dak::attention, in place, in a copy of a normalised graph."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch._subclasses.fake_tensor import maybe_get_fake_mode
from torch.fx import Node
from torch.fx.node import map_arg

import dak_inductor.lowering.ops  # noqa: F401  (registers torch.ops.dak)
from dak_inductor.attention_calls import AttentionCall, read_attention
from dak_inductor.dead_nodes import erase_unused, is_pure
from dak_inductor.normalise import value_of
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
    """Make an index_copy_ into memory that is not row-major an index_put_ of the same values.

    Inductor's decomposition of the former ends in a row-major copy of all of the memory, which for
    a cache that lies token by token is a copy of the cache per step; the latter is done in place.
    """
    target, dimension, index, source = node.args
    memory, position = value_of(target), value_of(index)
    if memory.is_contiguous() or position.dim() != 1 or memory.dim() == 0:
        return
    assert isinstance(dimension, int)
    before = [None] * (dimension % memory.dim())
    node.target = _aten.index_put_.default
    node.args = (target, [*before, index], source)


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
