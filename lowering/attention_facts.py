"""What is known about a call of dak::attention while its graph is traced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dak_inductor.lowering import op_facts
from dak_inductor.lowering.attention.operands import AttentionOperands
from dak_inductor.lowering.op_facts import OpFacts, static_size

Order = Literal["token_major", "head_major", "strided"]


@dataclass(frozen=True, slots=True)
class AttentionFacts(OpFacts):
    """One call; sizes that are symbolic are None. Of `OpFacts` only dtype, uniform (one dtype and
    device) and the installation are set.

    head_dim, value_dim: of queries and keys, and of values.
    ratio:  query heads to a KV head.
    rows:   queries of a sequence.
    order:  how keys and values lie in memory: "token_major" ([S, B, H, D]), "head_major"
            ([B, H, S, D], also with more room for tokens), "strided" where only the elements of a
            head are adjacent, or None.
    masked: "bool" or "float" where there is a mask besides lengths, starts, causality and window.
    """

    head_dim: int | None = None
    value_dim: int | None = None
    ratio: int | None = None
    rows: int | None = None
    order: Order | None = None
    masked: str = ""
    window: int = 0
    softcap: float = 0.0


def attention_facts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionFacts:
    """Of the operator's arguments, which may be fake. Adds no guard, traces no op."""
    call = AttentionOperands(*args, **kwargs)
    query, key, value = call.query, call.key, call.value
    heads, kv_heads = static_size(query.shape[1]), static_size(key.shape[1])
    orders = {_order(key), _order(value)}
    return AttentionFacts(
        dtype=key.dtype,
        uniform=query.dtype == key.dtype == value.dtype
        and query.device == key.device == value.device,
        capability=op_facts.visible_capability(query.device),
        extension=op_facts.extension_importable(),
        triton=op_facts.triton_importable(),
        head_dim=static_size(query.shape[3]),
        value_dim=static_size(value.shape[3]),
        ratio=heads // kv_heads if heads and kv_heads else None,
        rows=static_size(query.shape[2]),
        order=orders.pop() if len(orders) == 1 else None if None in orders else "strided",
        masked="" if call.mask is None else "bool" if call.mask.dtype == torch.bool else "float",
        window=call.window,
        softcap=call.softcap,
    )


def _order(tensor: Tensor) -> Order | None:
    """Strides of dimensions of one element are not asked: they may be anything."""
    batch, heads, tokens, depth = (static_size(size) for size in tensor.shape)
    outer, head, token, element = (static_size(step) for step in tensor.stride())
    if element != 1:
        return None
    if batch is None or heads is None or depth is None:
        return "strided"
    dense = (heads == 1 or head == depth) and (batch == 1 or outer == heads * depth)
    if dense and (tokens == 1 or token == batch * heads * depth):
        return "token_major"
    nested = batch == 1 or heads == 1 or (head is not None and outer == heads * head)
    return "head_major" if token == depth and nested else "strided"
