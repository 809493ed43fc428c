"""dak::attention: attention over keys and values that may lie in a tiered KV cache.

    dak::attention(query, key, value, lengths?, starts?, mask?, scale, causal, window, softcap)
        query [B, Hq, Q, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv] -> [B, Hq, Q, Dv]

Query head h reads KV head h // (Hq // Hkv).
    lengths: int32 [B], valid tokens of each sequence, the Q new ones included; None: S.
    starts:  int32 [B], the first valid token (left padding); None: 0.
    causal:  query i sees token t where t <= length - Q + i.
    window:  above 0, only where t > length - Q + i - window as well.
    mask:    bool (True: visible) or float (added to the scores), broadcastable to [B, Hq, Q, S].
    softcap: above 0, scores become softcap * tanh(scale * q.k / softcap) before masks.

A row that sees nothing is 0. The result is stored as [B, Q, Hq, Dv] on every path, so that
transpose(1, 2).reshape(...) moves nothing.

On CUDA a call over a tiered cache goes to `dak_inductor.lowering.attention`, then to the portable
kernel; what both decline runs as the composition of `stock_attention`, which reads the whole view
and is counted so.
On the CPU only the tokens that some query can see by lengths, starts and window are counted.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dak_inductor.lowering import reads, stock_attention
from dak_inductor.lowering.attention.operands import AttentionOperands
from dak_inductor.lowering.operator_record import Operator

log = logging.getLogger(__name__)

SCHEMA = (
    "attention(Tensor query, Tensor key, Tensor value, Tensor? lengths, Tensor? starts, "
    "Tensor? mask, float scale, bool causal, int window, float softcap) -> Tensor"
)
KERNELS = (
    "dak_inductor.lowering.attention.trials",
    "dak_inductor.lowering.triton_attention.launch",
)
"""Modules whose `run` serves calls on CUDA, in this order; one that is missing serves none."""


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    call = AttentionOperands(*args, **kwargs)
    check(call)
    return stock_attention.attention(call)


def _shape_of_result(*args: Any, **kwargs: Any) -> Tensor:
    call = AttentionOperands(*args, **kwargs)
    check(call)
    batch, heads, rows, _ = call.query.shape
    return call.query.new_empty((batch, rows, heads, call.value.shape[3])).transpose(1, 2)


def check(call: AttentionOperands) -> None:
    """Raises ValueError for operands that do not belong together. Symbolic sizes are not asked."""
    query, key, value, mask = call.query, call.key, call.value, call.mask
    shapes = f"query {_text(query)}, key {_text(key)}, value {_text(value)}"
    if any(tensor.dim() != 4 for tensor in (query, key, value)):
        raise ValueError(f"dak::attention takes [batch, heads, tokens, head_dim]; got {shapes}")
    if _differ(query.shape[3], key.shape[3]):
        raise ValueError(f"dak::attention: query and key differ in head_dim: {shapes}")
    if any(_differ(key.shape[axis], value.shape[axis]) for axis in range(3)):
        raise ValueError(
            f"dak::attention: key and value differ in batch, heads or tokens: {shapes}"
        )
    if _differ(query.shape[0], key.shape[0]):
        raise ValueError(
            f"dak::attention: {query.shape[0]} sequences of queries on a cache of {key.shape[0]}: "
            f"{shapes}"
        )
    heads, kv_heads = query.shape[1], key.shape[1]
    if isinstance(heads, int) and isinstance(kv_heads, int) and (not kv_heads or heads % kv_heads):
        raise ValueError(
            f"dak::attention: {heads} query heads are no multiple of {kv_heads} KV heads: {shapes}"
        )
    if not query.dtype == key.dtype == value.dtype or not query.dtype.is_floating_point:
        raise ValueError(
            "dak::attention: query, key and value must have one floating dtype; got "
            f"{query.dtype}, {key.dtype}, {value.dtype}"
        )
    for name, bound in (("lengths", call.lengths), ("starts", call.starts)):
        if bound is not None and (
            bound.dtype != torch.int32 or bound.dim() != 1 or _differ(bound.shape[0], key.shape[0])
        ):
            raise ValueError(
                f"dak::attention: {name} must be int32 of shape ({key.shape[0]},), got "
                f"{bound.dtype} of shape {_text(bound)}"
            )
    if mask is not None:
        _check_mask(mask, (*query.shape[:3], key.shape[2]))
    if call.window < 0 or call.softcap < 0:
        raise ValueError(
            f"dak::attention: window={call.window} and softcap={call.softcap} must be 0 (none) or "
            "more"
        )


def _check_mask(mask: Tensor, wanted: tuple[int, ...]) -> None:
    fits = mask.dim() <= 4 and not any(
        _differ(size, 1) and _differ(size, whole)
        for size, whole in zip(mask.shape[::-1], wanted[::-1], strict=False)
    )
    if not fits or not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
        raise ValueError(
            f"dak::attention: a mask of {mask.dtype} and shape {_text(mask)} is neither bool nor "
            f"floating, or does not broadcast to {tuple(wanted)}"
        )


def _differ(left: Any, right: Any) -> bool:
    """True for two known sizes that differ; a symbolic one would become a guard."""
    return isinstance(left, int) and isinstance(right, int) and left != right


def _text(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _count(*args: Any, **kwargs: Any) -> None:
    call = AttentionOperands(*args, **kwargs)
    caches = (call.key, call.value)
    if call.key.device.type != "cpu":  # stock kernels read what a mask hides, too
        reads.count_dense("attention", *caches)
        return
    check(call)
    batch, rows, tokens = call.query.shape[0], call.query.shape[2], call.key.shape[2]
    last = [tokens] * batch if call.lengths is None else call.lengths.tolist()
    if max(last, default=0) > tokens:
        raise ValueError(
            f"dak::attention: a sequence of {max(last)} tokens in a cache that holds {tokens}"
        )
    first = [0] * batch if call.starts is None else call.starts.tolist()
    if call.window:
        first = [
            max(start, length - rows - call.window + 1)
            for start, length in zip(first, last, strict=True)
        ]
    reads.count_tokens("attention", caches, list(zip(first, last, strict=True)))


@lru_cache(maxsize=1)
def _runners() -> tuple[Callable[[AttentionOperands], Tensor | None], ...]:
    """The entries of the kernels that this installation has."""
    found: list[Callable[[AttentionOperands], Tensor | None]] = []
    for name in KERNELS:
        try:
            found.append(importlib.import_module(name).run)
        except ImportError as error:
            log.warning("attention is not served by %s: %s", name, error)
    return tuple(found)


def _serve(*args: Any, **kwargs: Any) -> Tensor | None:
    """Offer a call to the kernels; None where nothing is tiered, or none takes it."""
    call = AttentionOperands(*args, **kwargs)
    check(call)
    if call.buffers == (None, None):
        return None
    for run in _runners():
        served = run(call)
        if served is not None:
            return served
    return None


ATTENTION_OPERATOR = Operator(
    "attention", SCHEMA, _attention, _count, _serve, _shape_of_result, any_strides=True
)
