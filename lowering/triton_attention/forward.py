"""Attention of many queries to tokens in device memory, under any mask that positions give."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dak_inductor.lowering.triton_attention.configuration import TileShape, precision, tile_shape
from dak_inductor.lowering.triton_attention.device import attend as attend_tokens
from dak_inductor.lowering.triton_attention.device import finished, visible_range

# Numbers of rows and tokens differ from call to call, and nothing is gained by their divisors.
_PLAIN = ("first_row", "rows", "QUERIES", "first_token", "held", "TOKENS", "WINDOW")


@triton.jit(do_not_specialize=_PLAIN)
def forward_kernel(
    Q, K, V, LENGTHS, STARTS, OUT, LSE,
    q_batch, q_head, q_row, k_batch, k_head, k_token, v_batch, v_head, v_token,
    KEY_HEADS, first_row, rows, QUERIES, first_token, held, TOKENS, WINDOW, scale, softcap,
    GROUP: tl.constexpr, HEAD: tl.constexpr, VALUE: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_STARTS: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One tile of rows of a query [B, Hq, rows, HEAD] over `held` tokens from `first_token` on.

    Its rows are QUERIES' rows from `first_row` on, its tokens some of TOKENS. OUT [B, rows, Hq,
    VALUE] and LSE [B, Hq, rows] are contiguous.
    """
    # The last rows see the most tokens: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    pair = tl.program_id(1)
    batch = (pair // KEY_HEADS).to(tl.int64)
    key_head = (pair % KEY_HEADS).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows * GROUP
    query = tl.minimum(row // GROUP, rows - 1)
    head = key_head * GROUP + row % GROUP
    first, last = visible_range(
        LENGTHS, STARTS, batch, first_row + query, QUERIES, TOKENS, WINDOW,
        CAUSAL, HAS_LENGTHS, HAS_STARTS,
    )  # fmt: skip
    first = tl.minimum(tl.maximum(first - first_token, 0), held)
    last = tl.minimum(tl.maximum(last - first_token, 0), held)
    low = tl.min(first)
    begin = low // BLOCK_N * BLOCK_N
    end = tl.max(last)
    # Whole blocks that every row sees need no mask.
    open_begin = tl.minimum((tl.max(first) + BLOCK_N - 1) // BLOCK_N * BLOCK_N, end)
    open_end = tl.maximum(tl.min(last) // BLOCK_N * BLOCK_N, open_begin)

    dim = tl.arange(0, BLOCK_D)
    q = tl.load(
        Q + batch * q_batch + (head * q_head + query.to(tl.int64) * q_row)[:, None] + dim[None, :],
        mask=inside[:, None] & (dim < HEAD)[None, :],
        other=0.0,
    )
    key = K + batch * k_batch + key_head * k_head
    value = V + batch * v_batch + key_head * v_head
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.full((BLOCK_M,), 0.0, tl.float32)
    sums = tl.full((BLOCK_M, BLOCK_V), 0.0, tl.float32)
    top, total, sums = attend_tokens(
        top, total, sums, q, key, value, k_token, v_token, begin, open_begin, low, first, last,
        scale, softcap, HEAD, VALUE, BLOCK_N, BLOCK_D, BLOCK_V, True, SOFTCAP, PRECISION,
    )  # fmt: skip
    top, total, sums = attend_tokens(
        top, total, sums, q, key, value, k_token, v_token, open_begin, open_end, low, first, last,
        scale, softcap, HEAD, VALUE, BLOCK_N, BLOCK_D, BLOCK_V, False, SOFTCAP, PRECISION,
    )  # fmt: skip
    top, total, sums = attend_tokens(
        top, total, sums, q, key, value, k_token, v_token, open_end, end, low, first, last,
        scale, softcap, HEAD, VALUE, BLOCK_N, BLOCK_D, BLOCK_V, True, SOFTCAP, PRECISION,
    )  # fmt: skip
    result, lse = finished(top, total, sums)
    wide = tl.arange(0, BLOCK_V)
    heads = KEY_HEADS * GROUP
    place = ((batch * rows + query) * heads + head) * VALUE
    tl.store(
        OUT + place[:, None] + wide[None, :],
        result.to(OUT.dtype.element_ty),
        mask=inside[:, None] & (wide < VALUE)[None, :],
    )
    tl.store(LSE + (batch * heads + head) * rows + query, lse, mask=inside)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    first_row: int,
    queries: int,
    first_token: int,
    tokens: int,
    lengths: Tensor | None,
    starts: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Some rows of a query over some tokens of a cache, on the current stream.

    Args:
        query: [B, Hq, rows, D], rows [first_row, first_row + rows) of `queries`.
        key, value: [B, Hkv, held, D] and [B, Hkv, held, Dv], tokens [first_token, first_token +
            held) of `tokens`; the last dimension is contiguous.
        out_dtype: of the result, default the query's; fp32 for a result that will be merged.
        lengths, starts: int32 [B] on the device, or None.

    Returns [B, rows, Hq, Dv] contiguous, and the log-sum-exp [B, Hq, rows].
    """
    batch, heads, rows, head_dim = query.shape
    key_heads, held, value_dim = key.shape[1], key.shape[2], value.shape[3]
    out = query.new_empty((batch, rows, heads, value_dim), dtype=out_dtype)
    lse = query.new_empty((batch, heads, rows), dtype=torch.float32)
    group = heads // key_heads
    shape: TileShape = tile_shape(group * rows, head_dim, value_dim, query.dtype)
    forward_kernel[(triton.cdiv(group * rows, shape.rows), batch * key_heads)](
        query,
        key,
        value,
        query if lengths is None else lengths,
        query if starts is None else starts,
        out,
        lse,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        key_heads,
        first_row,
        rows,
        queries,
        first_token,
        held,
        tokens,
        window,
        scale,
        softcap,
        GROUP=group,
        HEAD=head_dim,
        VALUE=value_dim,
        CAUSAL=causal,
        HAS_LENGTHS=lengths is not None,
        HAS_STARTS=starts is not None,
        SOFTCAP=softcap > 0,
        PRECISION=precision(query.dtype),
        BLOCK_M=shape.rows,
        BLOCK_N=shape.tokens,
        BLOCK_D=shape.head_columns,
        BLOCK_V=shape.value_columns,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
    return out, lse
