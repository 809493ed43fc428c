"""From a call of dak::attention to the launches of the portable kernels."""

from __future__ import annotations

import logging
from functools import lru_cache, partial

import torch
import triton
from torch import Tensor

from dak_inductor.lowering import residency  # noqa: F401  (registers torch.ops.dak.residency)
from dak_inductor.lowering.attention import operands
from dak_inductor.lowering.attention.operands import AttentionOperands
from dak_inductor.lowering.attention.stored_tokens import StoredTokens, stored_tokens
from dak_inductor.lowering.attention_rules import MOST_HEAD
from dak_inductor.lowering.marks import MARKS
from dak_inductor.lowering.refusals import TRITON_LEAST, capability, log_once
from dak_inductor.lowering.triton_attention.configuration import (
    DEFAULT_WINDOW,
    TileShape,
    chunk_tokens,
    precision,
    tile_shape,
)
from dak_inductor.lowering.triton_attention.decode import combine_kernel, decode_kernel
from dak_inductor.lowering.triton_linear.configuration import device_limits

log = logging.getLogger(__name__)
_log_once = partial(log_once, log, "the portable attention kernel does not take a call: %s")

_COMBINED = 16  # chunks that the second kernel reads at once


@torch.no_grad()
def run(call: AttentionOperands) -> Tensor | None:
    """Attention as dak::attention has it, [B, Hq, Q, Dv] stored as [B, Q, Hq, Dv].

    On the current stream, without waiting for the device; None, with the reason logged once, where
    it is refused. Remote tokens cross the link once for each tile of 64 or 128 query rows of a
    group of heads, so this is for few queries.
    """
    query, key, value = call.query, call.key, call.value
    reason = refusal(query, key, value, call.mask)
    if reason is not None:
        _log_once(reason)
        return None
    buffers = call.buffers
    keys, values = stored_tokens(key, buffers[0]), stored_tokens(value, buffers[1])
    if keys is None or values is None or (keys.segments == 1) != (values.segments == 1):
        _log_once("keys and values are neither both token-major nor both heads with all tokens")
        return None
    if query.stride(3) != 1:
        query = query.contiguous()
    group = query.shape[1] // key.shape[1]
    shape = tile_shape(group * query.shape[2], key.shape[3], value.shape[3], query.dtype)
    with MARKS.of_buffers("direct", (keys.buffer, values.buffer)):
        return launch(
            query,
            keys,
            values,
            shape,
            records=[torch.ops.dak.residency.default(tensor) for tensor in (key, value)],
            programs=_programs(query.device, shape, query.dtype.itemsize),
            lengths=call.lengths,
            starts=call.starts,
            scale=call.scale,
            causal=call.causal,
            window=call.window,
            softcap=call.softcap,
        )


def launch(
    query: Tensor,
    keys: StoredTokens,
    values: StoredTokens,
    shape: TileShape,
    *,
    records: list[Tensor],
    programs: int,
    lengths: Tensor | None,
    starts: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    chunk: int | None = None,
) -> Tensor:
    """`run` with tiles of `shape` on a grid of at most `programs`; `chunk` tokens a unit.

    `records` are those of keys and values (`dak_inductor.lowering.residency`).
    """
    batch, heads, queries, head_dim = query.shape
    key_heads, tokens = keys.tensor.shape[1:3]
    value_dim = values.tensor.shape[3]
    group = heads // key_heads
    groups = batch * key_heads * triton.cdiv(group * queries, shape.rows)
    rows = batch * heads * queries
    chunk = chunk or chunk_tokens(
        tokens=tokens,
        groups=groups,
        rows=rows,
        value_dim=value_dim,
        programs=programs,
        block=shape.tokens,
    )
    chunks = triton.cdiv(tokens, chunk)
    parts = query.new_empty((chunks, rows, value_dim), dtype=torch.float32)
    lse = query.new_empty((chunks, rows), dtype=torch.float32)
    out = query.new_empty((batch, queries, heads, value_dim))
    one_buffer = keys.buffer is not None and keys.buffer is values.buffer
    masks = {"HAS_LENGTHS": lengths is not None, "HAS_STARTS": starts is not None}
    lengths = query if lengths is None else lengths
    starts = query if starts is None else starts
    decode_kernel[(max(2, min(programs, chunks * groups)),)](
        query,
        keys.tensor,
        values.tensor,
        lengths,
        starts,
        *records,
        parts,
        lse,
        *query.stride()[:3],
        *keys.tensor.stride()[:3],
        *values.tensor.stride()[:3],
        keys.pitch,
        values.pitch,
        batch,
        key_heads,
        queries,
        tokens,
        window,
        chunk,
        chunks,
        scale,
        softcap,
        GROUP=group,
        HEAD=head_dim,
        VALUE=value_dim,
        ITEMSIZE=query.dtype.itemsize,
        CAUSAL=causal,
        **masks,
        SOFTCAP=softcap > 0,
        PRECISION=precision(query.dtype),
        TOKEN_MAJOR=keys.segments == 1,
        ONE_BUFFER=one_buffer,
        BYTES_IN_FLIGHT=shape.bytes_in_flight(query.dtype.itemsize),
        DEFAULT_WINDOW=DEFAULT_WINDOW,
        BLOCK_M=shape.rows,
        BLOCK_N=shape.tokens,
        BLOCK_D=shape.head_columns,
        BLOCK_V=shape.value_columns,
        BLOCK_B=triton.next_power_of_2(batch),
        BLOCK_H=triton.next_power_of_2(key_heads),
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
    combine_kernel[(rows,)](
        parts,
        lse,
        lengths,
        starts,
        out,
        batch,
        heads,
        queries,
        tokens,
        window,
        chunk,
        VALUE=value_dim,
        CAUSAL=causal,
        **masks,
        BLOCK_C=_COMBINED,
        BLOCK_V=shape.value_columns,
        num_warps=4,
    )
    return out.transpose(1, 2)


def refusal(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str | None:
    """Why these kernels do not take a call; None where they do."""
    reason = operands.refusal(query, key, value, mask)
    if reason is not None:
        return reason
    if max(query.shape[3], value.shape[3]) > MOST_HEAD:
        return f"a head of more than {MOST_HEAD}"
    if query.is_cuda and capability(query.device.index) < TRITON_LEAST:
        return "it needs compute capability 8.0 or newer"
    return None


@lru_cache(maxsize=64)
def _programs(device: torch.device, shape: TileShape, itemsize: int) -> int:
    """Programs that the device holds at once, two on a processor at most."""
    limits = device_limits(device)
    tile = shape.tokens * (shape.head_columns + shape.value_columns)
    shared = (shape.stages * tile + shape.rows * shape.head_columns) * itemsize
    return max(2, limits.processors * min(2, max(1, limits.shared_bytes_per_processor // shared)))
