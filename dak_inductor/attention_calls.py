"""Attention in a normalised graph, whatever it is spelled with, as the arguments of dak::attention.

    aten.scaled_dot_product_attention(query, key, value, mask, p, causal, scale, enable_gqa)
    matmul(dropout(softmax(softcap(matmul(query, key^T) * scale) + mask)), value)

Heads repeated for grouped queries, and copies that change no value, are taken off keys and values,
so that what is read is the cache itself, each byte of it once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from dak_inductor.normalise import value_of
from dak_inductor.score_steps import Scores, read_scores, upwards
from dak_inductor.sizes import Size, shape_of
from dak_inductor.views import (
    MAYBE_VIEWS,
    changes_not,
    memory_behind,
    showing,
    writes_first,
    written_between,
)

_aten = torch.ops.aten
_STRIDED_VIEWS = MAYBE_VIEWS | {_aten.view.default, _aten.view_as.default}
PRODUCTS = (_aten.matmul.default, _aten.bmm.default)
_STALE = "keys or values are written after they were copied for attention"
_LEAST_FILL = -1e9
"""A fill no higher hides a token also as a term: float32 drops scores below 32 beside it, so that
a row that is all filled stays even."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """`result` computes attention of `query` over `key` and `value`, the heads of these as stored.

    mask:     None, or bool or float; where `fill` is given, True hides a token by adding `fill`.
    scale:    None for 1 / sqrt(head_dim).
    first:    None, or only so many tokens of keys and values are seen, with causal.
    absorbed: the nodes before `result` that nothing else uses, the product with the keys first;
              empty for an operator of its own.
    """

    result: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None = None
    fill: float | None = None
    scale: float | None = None
    causal: bool = False
    softcap: float = 0.0
    first: Size | None = None
    absorbed: tuple[Node, ...] = ()


def read_attention(node: Node) -> AttentionCall | str | None:
    """The attention that `node` computes; a reason why it cannot be written as dak::attention; None
    where it computes something else. A reason is a sentence without a full stop."""
    call: AttentionCall | str | None
    if node.target is _aten.scaled_dot_product_attention.default:
        call = _from_operator(node)
    elif node.target in PRODUCTS:
        call = _from_products(node)
    else:
        return None
    if not isinstance(call, AttentionCall):
        return call
    reason = _reason(call)
    return call if reason is None else reason


def attention_of_scores(node: Node) -> AttentionCall | str | None:
    """The attention of which `node` is the product of queries and keys, read as above."""
    steps = [node]
    while len(users := list(steps[-1].users)) == 1:
        user = users[0]
        if user.target in PRODUCTS and user.args[0] is steps[-1]:
            call = read_attention(user)
            if isinstance(call, AttentionCall):
                return call if node in call.absorbed else None
            return call if node in _absorbed(user) else None
        if user.op != "call_function" or len(steps) > 16:
            return None
        steps.append(user)
    return None


def _absorbed(node: Node) -> tuple[Node, ...]:
    scores = read_scores(node.args[0])
    return scores.nodes if isinstance(scores, Scores) else ()


def _from_operator(node: Node) -> AttentionCall | str:
    names = ("attn_mask", "dropout_p", "is_causal")
    values: dict[str, Any] = dict(zip(names, (None, 0.0, False), strict=True))
    values.update(zip(names, node.args[3:], strict=False))
    values.update(node.kwargs)  # scale and enable_gqa are keywords only
    query, key, value = node.args[:3]
    if values["dropout_p"]:
        return f"attention with dropout of {values['dropout_p']}"
    call = _call(node, query, key, value)
    if isinstance(call, str):
        return call
    if _written_after_copy(call, key, value):
        return _STALE
    call = replace(
        call,
        mask=values["attn_mask"],
        scale=values.get("scale"),
        causal=bool(values["is_causal"]),
    )
    rows, tokens = shape_of(value_of(query))[2], shape_of(value_of(key))[2]
    if not call.causal or rows == tokens:
        return call
    if isinstance(rows, int) and isinstance(tokens, int) and rows < tokens:
        # torch counts from the first token, so that later ones are hidden from all queries
        return replace(call, first=rows)
    return "is_causal with more queries than tokens, or as many as only a run can tell"


def _from_products(node: Node) -> AttentionCall | str | None:
    weights, value = node.args[:2]
    scores = read_scores(weights)
    if scores is None or isinstance(scores, str):
        return scores
    key = scores.key
    call = _call(node, scores.query, key, value)
    if isinstance(call, str):
        return call
    if scores.used_elsewhere:
        return "the attention weights are used elsewhere in the graph"
    operands = (scores.query, call.key, call.value)
    masks = () if scores.mask is None else (scores.mask,)
    if written_between(scores.nodes[0], node, (*operands, *masks)):
        return "keys or values are written between the two products"
    if _written_after_copy(call, key, value):
        return _STALE
    return replace(
        call,
        mask=scores.mask,
        fill=scores.fill,
        scale=scores.scale,
        softcap=scores.softcap,
        absorbed=scores.nodes,
    )


def _call(node: Node, query: object, key: object, value: object) -> AttentionCall | str:
    for operand in (query, key, value):
        if not isinstance(operand, Node) or value_of(operand).dim() != 4:
            return "attention over other than four dimensions"
    assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
    key, value = _without_copies(key), _without_copies(value)
    bare_key, bare_value = _without_repeats(key), _without_repeats(value)
    if shape_of(value_of(bare_key))[1] == shape_of(value_of(bare_value))[1]:
        key, value = bare_key, bare_value
    return AttentionCall(result=node, query=query, key=key, value=value)


def _written_after_copy(call: AttentionCall, key: object, value: object) -> bool:
    """Whether `key` or `value` may be a copy of what was in the cache before a later write."""
    for bare, step in ((call.key, key), (call.value, value)):
        first = None
        while step is not bare:
            assert isinstance(step, Node)
            first, step = step, step.args[0]
        if first is not None and written_between(first, call.result, (bare,)):
            return True
    return False


def _reason(call: AttentionCall) -> str | None:
    query, key, value = (value_of(n) for n in (call.query, call.key, call.value))
    if not query.dtype == key.dtype == value.dtype == value_of(call.result).dtype:
        return f"operands of {query.dtype}, {key.dtype} and {value.dtype}"
    if not (query.dtype.is_floating_point and query.device == key.device == value.device):
        return "operands on several devices, or not floating"
    heads, kv_heads = shape_of(query)[1], shape_of(key)[1]
    if not (isinstance(heads, int) and isinstance(kv_heads, int) and kv_heads):
        return "a number of heads that only a run can tell"
    if heads % kv_heads or shape_of(value)[1] != kv_heads:
        return f"{heads} query heads over {kv_heads} KV heads"
    if shape_of(query)[0] != shape_of(key)[0] or shape_of(key)[:3] != shape_of(value)[:3]:
        return "queries, keys and values that are broadcast"
    if call.scale is None and not isinstance(shape_of(query)[3], int):
        return "a head_dim that only a run can tell"
    if call.fill is not None and not call.fill <= _LEAST_FILL:
        return f"scores are replaced by {call.fill}, which is no sum of them and a mask"
    if _written_as_view(call.result):
        return "the result is written in place, and has views that need its strides"
    if call.mask is not None:
        mask = value_of(call.mask)
        if mask.dim() > 4 or not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
            return f"a mask of {mask.dtype} with {mask.dim()} dimensions"
        if not _broadcasts(shape_of(mask), (*shape_of(query)[:3], shape_of(key)[2])):
            return "a mask that widens the scores"
    return None


def _written_as_view(result: Node) -> bool:
    """Whether the result is written in place and has views that are copies under other strides."""
    memory = memory_behind(result)
    shown = [user for user in showing(result) if memory_behind(user) is memory]
    viewed = any(user.target in _STRIDED_VIEWS for user in shown)
    return viewed and any(writes_first(user) for user in shown)


def _broadcasts(mask: tuple[Size, ...], scores: tuple[Size, ...]) -> bool:
    pairs = zip(mask[::-1], scores[::-1], strict=False)
    return all(size in (1, whole) for size, whole in pairs)


def _without_copies(node: Node) -> Node:
    """The value before steps that give the same one in the same shape."""
    same = (_aten.contiguous.default, _aten.detach.default)
    while node.op == "call_function" and isinstance(node.args[0] if node.args else None, Node):
        if not (node.target in same or changes_not(node)):
            break
        node = node.args[0]  # type: ignore[assignment]
    return node


def _without_repeats(node: Node) -> Node:
    """Keys or values [B, Hkv, S, D] before each head was repeated for the queries of its group."""
    batch, heads, tokens, depth = shape_of(value_of(node))
    base: object
    for step in upwards(node, through=_RESHAPES):
        if step.target is _aten.repeat_interleave.self_int and step.args[2:3] == (1,):
            base = step.args[0]
        elif step.target is _aten.expand.default:
            base = _before_unsqueeze(step)
        else:
            continue
        if not isinstance(base, Node):
            return node
        shape = shape_of(value_of(base))
        if len(shape) != 4 or (shape[0], *shape[2:]) != (batch, tokens, depth):
            return node
        if step.target is _aten.expand.default:
            group = shape_of(value_of(step))[2]
            if shape_of(value_of(step)) != (batch, shape[1], group, tokens, depth):
                return node
        if not isinstance(heads, int) or not isinstance(shape[1], int) or heads % shape[1]:
            return node
        return _without_copies(base)
    return node


_RESHAPES = (
    _aten.reshape.default,
    _aten.view.default,
    _aten.flatten.using_ints,
    _aten._unsafe_view.default,
    _aten.contiguous.default,
    _aten.clone.default,
)


def _before_unsqueeze(expand: Node) -> object:
    """What `expand` repeats along a new third dimension."""
    source: object = expand.args[0]
    while isinstance(source, Node) and source.target is _aten.slice.Tensor:
        if shape_of(value_of(source)) != shape_of(value_of(source.args[0])):
            return None
        source = source.args[0]
    if not isinstance(source, Node) or source.target is not _aten.unsqueeze.default:
        return None
    return source.args[0] if source.args[1] in (2, -3) else None
