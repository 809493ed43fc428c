"""What attention over a KV cache reads and computes, or why it is left to the stock kernels."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from dak_inductor.attention_calls import AttentionCall, read_attention
from dak_inductor.normalise import value_of
from dak_inductor.op_match import Match, Read, dtype_name, nbytes
from dak_inductor.provenance import parameter_name
from dak_inductor.sizes import Size, add, product, shape_of
from dak_inductor.views import cache_behind, memory_read, updated_in_place

_ONE_SIDED = "only one of keys and values lies in a cache; the other is computed in the graph"


def attention_operator(node: Node) -> Match | str:
    """The rule of aten.scaled_dot_product_attention."""
    call = read_attention(node)
    operands = node.args[1:3]
    if isinstance(call, AttentionCall):
        match = over_cache(call)
        if match is not None:
            return match
        operands = (call.key, call.value)
    reads = tuple(
        Read.of(operand, source)
        for operand in operands
        if isinstance(operand, Node) and (source := cache_behind(operand)) is not None
    )
    if not reads:
        return "keys and values are computed in the graph; there is no cache to tier"
    query, key, value = (value_of(argument) for argument in node.args[:3])
    return Match(
        kind="attention",
        reads=reads,
        m=shape_of(query)[-2],
        other=add(nbytes(query), nbytes(value_of(node))),
        flops=attention_flops(
            query, key, value, shape_of(key)[-2], causal=bool(getattr(call, "causal", False))
        ),
        dtype=dtype_name(query.dtype),
        rewrite=False,
        refusal=call if isinstance(call, str) else _ONE_SIDED,
    )


def attention_in_place(node: Node) -> Match | str:
    """The rule of dak::attention, which transformers' attention function "dak" calls itself."""
    query, key, value, _, _, mask, scale, causal = node.args[:8]
    assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
    assert mask is None or isinstance(mask, Node)
    assert isinstance(scale, float)
    match = over_cache(
        AttentionCall(node, query, key, value, mask=mask, scale=scale, causal=bool(causal))
    )
    if match is None:
        return "keys and values are computed in the graph; there is no cache to tier"
    return replace(match, rewrite=True, refusal="")  # it is written already


def over_cache(call: AttentionCall) -> Match | None:
    """Attention whose keys and values both lie behind graph inputs; None where they do not."""
    sources = cache_behind(call.key), cache_behind(call.value)
    if sources[0] is None or sources[1] is None:
        return None
    query, key, value = (value_of(n) for n in (call.query, call.key, call.value))
    tokens = shape_of(key)[2] if call.first is None else call.first
    reads = tuple(
        Read.of(operand, source)
        if call.first is None
        else Read(source, product((*_others(value_of(operand)), tokens)))
        for operand, source in zip((call.key, call.value), sources, strict=True)
        if source is not None
    )
    other = add(nbytes(query), nbytes(value_of(call.result)))
    if call.mask is not None:
        other = add(other, nbytes(value_of(call.mask)))
    refusal = _no_cache(call)
    return Match(
        kind="attention",
        reads=reads,
        m=shape_of(query)[2],
        other=other,
        flops=attention_flops(query, key, value, tokens, causal=call.causal),
        dtype=dtype_name(key.dtype),
        rewrite=not refusal,
        refusal=refusal,
    )


def _others(tensor: torch.Tensor) -> tuple[Size, ...]:
    """Factors of the bytes of keys or values, but for the number of tokens."""
    batch, heads, _, depth = shape_of(tensor)
    return batch, heads, depth, tensor.element_size()


def attention_flops(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tokens: Size, *, causal: bool
) -> Size:
    """Of both products over the first `tokens` of keys and values; with `causal` the last query
    sees all of them, each one before it a token less."""
    *others, rows = shape_of(query)[:-1]
    depth = add(shape_of(key)[-1], shape_of(value)[-1])
    hidden = add(rows, -1) if causal else 0
    return product((*others, rows, add(product((2, tokens)), product((-1, hidden))), depth))


def _no_cache(call: AttentionCall) -> str:
    """Why keys or values are not a cache that a kernel can read in place; "" where they are."""
    for name, operand in (("keys", call.key), ("values", call.value)):
        source = memory_read(operand)
        if source is None:
            return f"{name} are copied or converted before attention, which then reads the copy"
        if not (updated_in_place(source) or _is_static(source)):
            return f"{name} are an input of the graph that it neither updates nor knows as static"
    return ""


def _is_static(source: Node) -> bool:
    """A graph input whose address Dynamo was told to keep, or a tensor of a module."""
    kept = source.meta.get("tensor_dict") or {}
    return bool(parameter_name(source)) or "_dynamo_static_input_type" in kept
