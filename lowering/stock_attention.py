"""Attention composed of ATen operators: what dak::attention computes where no kernel takes it.

Nothing here waits for the device: which tokens a query sees is worked out where `lengths` and
`starts` lie. A mask is made only where one is needed, and it has one row per query and sequence,
not per head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dak_inductor.lowering.attention.operands import AttentionOperands

_aten = torch.ops.aten


def attention(call: AttentionOperands) -> Tensor:
    """dak::attention as its schema says; [B, Hq, Q, Dv], stored as [B, Q, Hq, Dv].

    The mask of a row that sees nothing is opened and the row then set to 0, so that no kernel meets
    a softmax over nothing.
    """
    query, key, value, window = call.query, call.key, call.value, call.window
    scale, causal, softcap = call.scale, call.causal, call.softcap
    rows, tokens = query.shape[2], key.shape[2]
    # lengths and starts are clamped to the view by the comparison with its tokens
    if query.numel() == 0 or tokens == 0:
        return stored(query.new_zeros((*query.shape[:3], value.shape[3])))
    bounds = (call.lengths, call.starts, call.mask)
    whole = all(bound is None for bound in bounds) and softcap == 0
    if whole and (window == 0 or window >= tokens) and not (causal and rows > 1 and rows != tokens):
        square = causal and rows > 1
        grouped = query.shape[1] != key.shape[1]
        return stored(
            _aten.scaled_dot_product_attention.default(
                query, key, value, None, 0.0, square, scale=scale, enable_gqa=grouped
            )
        )
    seen, bias = _visible(call)
    empty = None if seen is None else ~seen.any(-1, keepdim=True)
    if seen is not None and empty is not None:
        bias = _combined(seen | empty, bias, query.dtype)
    assert bias is not None
    result = _weighted_sum(query, key, value, bias, scale, softcap)
    if empty is not None:
        result = result.masked_fill(empty, 0.0)
    return stored(result)


def stored(result: Tensor) -> Tensor:
    """[B, H, Q, D] stored as [B, Q, H, D], with the same strides whatever they were.

    Through one dimension, because sizes of 1 would keep the strides that they came with.
    """
    batch, heads, rows, depth = result.shape
    flat = result.transpose(1, 2).reshape(-1)
    return flat.view(batch, rows, heads, depth).transpose(1, 2)


def _visible(call: AttentionOperands) -> tuple[Tensor | None, Tensor | None]:
    """Which tokens a query sees, bool, and what is added to its scores, both over [B, H, Q, S].

    At least one of them is given; dimensions in which all is equal have size 1.
    """
    rows, tokens, device = call.query.shape[2], call.key.shape[2], call.query.device
    lengths, starts, mask, window = call.lengths, call.starts, call.mask, call.window
    token = torch.arange(tokens, device=device)
    length = tokens if lengths is None else lengths.view(-1, 1, 1, 1)
    terms: list[Tensor] = []
    row = torch.arange(rows, device=device).view(1, 1, rows, 1)
    if call.causal and rows > 1:
        terms.append(token <= length - rows + row)
    elif lengths is not None:
        terms.append(token < length)
    if window:
        terms.append(token > length - rows + row - window)
    if starts is not None:
        terms.append(token >= starts.view(-1, 1, 1, 1))
    bias = None
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
        if mask.dtype == torch.bool:
            terms.append(mask)
        else:
            bias = mask
            # a row of which all is -inf sees nothing, as with a bool mask
            terms.append(mask != float("-inf"))
    seen = terms[0] if terms else None
    for term in terms[1:]:
        assert seen is not None
        seen = seen & term
    if seen is None and bias is None:  # softcap alone
        seen = torch.ones((1, 1, 1, tokens), dtype=torch.bool, device=device)
    return seen, bias


def _combined(seen: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """One mask, as the operators take it: bool, or added to scores of `dtype`."""
    if bias is None:
        return seen
    lowest = torch.finfo(dtype).min
    # the lowest float32, which models add to hide a token, is -inf in a shorter dtype
    kept = bias.clamp(min=lowest).to(dtype)
    return torch.where(seen, kept, float("-inf"))


def _weighted_sum(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float
) -> Tensor:
    """softmax(...) V. The query heads of a group become rows of one head, so that each KV byte is
    read once; repeated heads would be written out."""
    batch, heads, rows, depth = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    packed = query.reshape(batch, kv_heads, group * rows, depth)
    mask = _packed_mask(mask, kv_heads, group, rows)
    if softcap == 0:
        result = _aten.scaled_dot_product_attention.default(
            packed, key, value, mask, 0.0, False, scale=scale
        )
    else:
        scores = torch.matmul(packed, key.transpose(2, 3)).float() * scale
        scores = softcap * torch.tanh(scores / softcap)
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, float("-inf"))
        else:
            scores = scores + mask
        result = torch.matmul(torch.softmax(scores, dim=-1).to(query.dtype), value)
    return result.reshape(batch, heads, rows, value.shape[3])


def _packed_mask(mask: Tensor, kv_heads: int, group: int, rows: int) -> Tensor:
    """The mask over [B, Hq, Q, S] for scores over [B, Hkv, group * Q, S]."""
    if group == 1:
        return mask
    batch, heads, mask_rows, tokens = mask.shape
    if heads == 1:
        if mask_rows == 1:
            return mask
        repeated = mask.unsqueeze(2).expand(batch, 1, group, mask_rows, tokens)
        return repeated.reshape(batch, 1, group * mask_rows, tokens)
    split = mask.reshape(batch, kv_heads, group, mask_rows, tokens)
    spread = split.expand(batch, kv_heads, group, rows, tokens)
    return spread.reshape(batch, kv_heads, group * rows, tokens)
