"""From a call of dak::attention to a launch, or to the reason why there is none."""

from __future__ import annotations

import logging
import math
from functools import partial

import torch
from torch import Tensor

from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.lowering.attention import tensor_maps
from dak_inductor.lowering.attention.configuration import MAXIMUM_QUERIES, choose, refusal
from dak_inductor.lowering.attention.launch import CachedTensor, launch
from dak_inductor.lowering.attention.operands import AttentionOperands
from dak_inductor.lowering.attention.problem import AttentionMasking, AttentionProblem
from dak_inductor.lowering.element_types import DTYPES
from dak_inductor.lowering.marks import MARKS
from dak_inductor.lowering.refusals import HOPPER, capability, log_once

log = logging.getLogger(__name__)
_log_once = partial(log_once, log, "a stock kernel reads tiered keys and values: %s")


def run(call: AttentionOperands) -> Tensor | None:
    """dak::attention as its schema says, [B, Hq, Q, D]; None where no kernel takes it.

    The result is stored as [B, Q, Hq, D]. Where nothing is tiered the call is declined without a
    word: the stock op serves it. Other reasons are logged once each.
    """
    buffers = call.buffers
    if buffers == (None, None):
        return None
    query, key, value = call.query, call.key, call.value
    if query.dim() == 4 and query.shape[2] > MAXIMUM_QUERIES:
        from dak_inductor.lowering.attention import staged

        return staged.run(call)
    masking = call.masking
    reason = (
        _refusal_of_masks(call.mask, masking)
        or _refusal_of_tensors(call)
        or _refusal_of_tiers(buffers)
    )
    if reason is None:
        problem = problem_of(query, key)
        reason = refusal(problem)
    if reason is not None:
        _log_once(reason)
        return None
    if any(stride % 8 for stride in query.stride()[:3]) or query.stride(3) != 1:
        query = query.contiguous()
    if query.data_ptr() % tensor_maps.ALIGNMENT:
        query = query.clone(memory_format=torch.contiguous_format)
    batch, heads, queries, head_dim = query.shape
    out = torch.empty((batch, queries, heads, head_dim), dtype=query.dtype, device=query.device)
    with MARKS.of_buffers("direct", buffers):
        launch(
            problem,
            choose(problem),
            query=query,
            caches=(CachedTensor(key, buffers[0]), CachedTensor(value, buffers[1])),
            lengths=call.lengths,
            starts=call.starts,
            masking=masking,
            out=out,
        )
    return out.transpose(1, 2)


def problem_of(query: Tensor, key: Tensor) -> AttentionProblem:
    batch, kv_heads, tokens, head_dim = key.shape
    ratio = query.shape[1] // kv_heads
    return AttentionProblem(batch, kv_heads, ratio, query.shape[2], tokens, head_dim, query.dtype)


def _refusal_of_masks(mask: Tensor | None, masking: AttentionMasking) -> str | None:
    if mask is not None:
        return "it has a mask tensor; the kernel masks by lengths, starts and window"
    if not (masking.scale > 0 and math.isfinite(masking.scale)):
        return f"its scale is {masking.scale}; a finite one above 0 is needed"
    if not (masking.softcap >= 0 and math.isfinite(masking.softcap)):
        return f"its softcap is {masking.softcap}; a finite one, or 0 for none, is needed"
    if not 0 <= masking.window < 2**31:
        return f"its window is {masking.window} tokens"
    return None


def _refusal_of_tensors(call: AttentionOperands) -> str | None:
    """Why the kernel does not take these operands."""
    query, key, value = call.query, call.key, call.value
    if any(tensor.dim() != 4 for tensor in (query, key, value)):
        return "its operands do not have four dimensions"
    if any(tensor.dtype != query.dtype for tensor in (key, value)) or query.dtype not in DTYPES:
        return f"its operands are not all bfloat16 or all float16 (the query is {query.dtype})"
    bounds = [tensor for tensor in (call.lengths, call.starts) if tensor is not None]
    if any(tensor.device != query.device for tensor in (key, value, *bounds)):
        return "its operands are on different devices"
    if capability(query.device.index) != HOPPER:
        return "the GPU is no Hopper card (compute capability 9.0)"
    if key.shape != value.shape:
        return f"keys are {tuple(key.shape)} and values {tuple(value.shape)}"
    batch, heads, _, head_dim = query.shape
    fits = key.shape[0] == batch and key.shape[3] == head_dim and key.shape[1] > 0
    if query.numel() == 0 or not fits or heads % key.shape[1]:
        return f"the query is {tuple(query.shape)} and the keys are {tuple(key.shape)}"
    if any(
        bound.dtype != torch.int32 or bound.shape != (batch,) or not bound.is_contiguous()
        for bound in bounds
    ):
        return "its lengths or starts are no contiguous int32 of one element for each sequence"
    for name, cache in (("keys", key), ("values", value)):
        reason = tensor_maps.refusal(cache)
        if reason is not None:
            return f"of the {name}, {reason}"
    return None


def _refusal_of_tiers(buffers: tuple[TieredBuffer | None, TieredBuffer | None]) -> str | None:
    tiered = [buffer for buffer in buffers if buffer is not None]
    if len({buffer.tier for buffer in tiered}) > 1:
        return "keys and values lie in different remote tiers"
    if any(not buffer.device_record for buffer in tiered):
        return "the tier of keys or values has no record in device memory"
    return None
