"""Decode: few queries over all tokens, remote ones read in place within the window of their link.

A unit of work is a tile of query rows over a chunk of tokens. The first programs of a persistent
grid take the units with remote tokens, as many programs as fill the window; the others take the
local ones. A second kernel merges the chunks of each row.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from dak_inductor.lowering.triton_attention.device import (
    attend,
    finished,
    local_tokens,
    tier_bytes,
    visible_range,
)
from dak_inductor.lowering.triton_linear.device import count, reading_programs, tile_range


@triton.jit
def _first_remote(
    pointer,
    record,
    token_bytes,
    segment_bytes,
    TOKENS,
    reached,
    chunk,
    chunks,
    units,
    of_token,
    TOKEN_MAJOR: tl.constexpr,
):
    """The first unit with remote tokens; `of_token` units share a chunk of a segment.

    A chunk with the split in it counts as remote. Tokens from `reached` on are not read.
    """
    segment, token, _ = local_tokens(
        pointer, record, token_bytes, segment_bytes, TOKENS, TOKEN_MAJOR
    )
    if TOKEN_MAJOR:
        return tl.where(token >= reached, units, token // chunk * of_token)
    at = tl.where(token >= TOKENS, chunks, token // chunk)
    return tl.minimum((segment * chunks + at) * of_token, units).to(tl.int32)


_PLAIN = ("BATCH", "QUERIES", "TOKENS", "WINDOW", "chunk", "chunks")


@triton.jit(do_not_specialize=_PLAIN)
def decode_kernel(
    Q, K, V, LENGTHS, STARTS, K_RECORD, V_RECORD, OUT, LSE,
    q_batch, q_head, q_row, k_batch, k_head, k_token, v_batch, v_head, v_token,
    k_segment, v_segment,
    BATCH, KEY_HEADS, QUERIES, TOKENS, WINDOW, chunk, chunks, scale, softcap,
    GROUP: tl.constexpr, HEAD: tl.constexpr, VALUE: tl.constexpr, ITEMSIZE: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_STARTS: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, TOKEN_MAJOR: tl.constexpr,
    ONE_BUFFER: tl.constexpr, BYTES_IN_FLIGHT: tl.constexpr, DEFAULT_WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Partial results OUT [chunks, B, Hq, QUERIES, VALUE] and LSE without the last dimension, fp32.

    Chunks behind the longest sequence are left as they are. `k_token` and `v_token` are elements
    between tokens, `k_segment` and `v_segment` between heads where each has all its tokens.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    sequence = tl.arange(0, BLOCK_B)
    known = tl.minimum(sequence, BATCH - 1)
    lowest, _ = visible_range(
        LENGTHS, STARTS, known, known * 0, QUERIES, TOKENS, WINDOW,
        CAUSAL, HAS_LENGTHS, HAS_STARTS,
    )  # fmt: skip
    _, highest = visible_range(
        LENGTHS, STARTS, known, known * 0 + QUERIES - 1, QUERIES, TOKENS, WINDOW,
        CAUSAL, HAS_LENGTHS, HAS_STARTS,
    )  # fmt: skip
    reached = tl.maximum(tl.max(highest), 0)
    tiles = (QUERIES * GROUP + BLOCK_M - 1) // BLOCK_M
    groups = BATCH * KEY_HEADS * tiles
    if TOKEN_MAJOR:
        units = (reached + chunk - 1) // chunk * groups
        of_token = groups
    else:
        units = chunks * groups
        of_token = tiles
    k_bytes, v_bytes = k_token * ITEMSIZE, v_token * ITEMSIZE
    first_remote = tl.minimum(
        _first_remote(
            K, K_RECORD, k_bytes, k_segment * ITEMSIZE, TOKENS, reached, chunk, chunks, units,
            of_token, TOKEN_MAJOR,
        ),
        _first_remote(
            V, V_RECORD, v_bytes, v_segment * ITEMSIZE, TOKENS, reached, chunk, chunks, units,
            of_token, TOKEN_MAJOR,
        ),
    )  # fmt: skip
    readers = tl.minimum(
        reading_programs(K_RECORD, BYTES_IN_FLIGHT, DEFAULT_WINDOW),
        reading_programs(V_RECORD, BYTES_IN_FLIGHT, DEFAULT_WINDOW),
    )
    start, stop, step = tile_range(program, programs, readers, first_remote, units)
    in_flight = tl.minimum(readers, units - first_remote) * BYTES_IN_FLIGHT
    if program == 0:
        k_local, k_all = tier_bytes(
            K, K_RECORD, lowest, highest, sequence, BATCH, KEY_HEADS, k_bytes,
            k_segment * ITEMSIZE, HEAD * ITEMSIZE, TOKENS, TOKEN_MAJOR, BLOCK_H,
        )  # fmt: skip
        v_local, v_all = tier_bytes(
            V, V_RECORD, lowest, highest, sequence, BATCH, KEY_HEADS, v_bytes,
            v_segment * ITEMSIZE, VALUE * ITEMSIZE, TOKENS, TOKEN_MAJOR, BLOCK_H,
        )  # fmt: skip
        # Each tile of rows asks the link for the remote tokens again.
        if ONE_BUFFER:
            remote = (k_all + v_all - k_local - v_local) * tiles
            count(K_RECORD, program, k_local + v_local, remote, in_flight)
        else:
            count(K_RECORD, program, k_local, (k_all - k_local) * tiles, in_flight)
            count(V_RECORD, program, v_local, (v_all - v_local) * tiles, in_flight)

    dim = tl.arange(0, BLOCK_D)
    wide = tl.arange(0, BLOCK_V)
    for unit in range(start, stop, step):
        if TOKEN_MAJOR:
            at = unit // groups
            pair = unit % groups // tiles
            tile = unit % tiles
        else:
            at = unit // tiles % chunks
            pair = unit // tiles // chunks
            tile = unit % tiles
        batch = (pair // KEY_HEADS).to(tl.int64)
        key_head = (pair % KEY_HEADS).to(tl.int64)
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = row < QUERIES * GROUP
        query = tl.minimum(row // GROUP, QUERIES - 1)
        head = key_head * GROUP + row % GROUP
        first, last = visible_range(
            LENGTHS, STARTS, batch, query, QUERIES, TOKENS, WINDOW,
            CAUSAL, HAS_LENGTHS, HAS_STARTS,
        )  # fmt: skip
        begin = at * chunk
        last = tl.minimum(last, begin + chunk)
        low = tl.min(first)
        near = tl.maximum(begin, low // BLOCK_N * BLOCK_N)
        q = tl.load(
            Q + batch * q_batch + (head * q_head + query.to(tl.int64) * q_row)[:, None]
            + dim[None, :],
            mask=inside[:, None] & (dim < HEAD)[None, :],
            other=0.0,
        )  # fmt: skip
        top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        total = tl.full((BLOCK_M,), 0.0, tl.float32)
        sums = tl.full((BLOCK_M, BLOCK_V), 0.0, tl.float32)
        top, total, sums = attend(
            top, total, sums, q,
            K + batch * k_batch + key_head * k_head, V + batch * v_batch + key_head * v_head,
            k_token, v_token, near, tl.max(last), low, first, last, scale, softcap,
            HEAD, VALUE, BLOCK_N, BLOCK_D, BLOCK_V, True, SOFTCAP, PRECISION,
        )  # fmt: skip
        result, lse = finished(top, total, sums)
        place = ((at * BATCH + batch) * (KEY_HEADS * GROUP) + head) * QUERIES + query
        seen = inside & (lse > -float("inf"))
        tl.store(
            OUT + place[:, None] * VALUE + wide[None, :],
            result,
            mask=seen[:, None] & (wide < VALUE)[None, :],
        )
        tl.store(LSE + place, lse, mask=inside)


@triton.jit(do_not_specialize=("BATCH", "QUERIES", "TOKENS", "WINDOW", "chunk"))
def combine_kernel(
    PARTS, LSE, LENGTHS, STARTS, OUT, BATCH, HEADS, QUERIES, TOKENS, WINDOW, chunk,
    VALUE: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_STARTS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row of the result OUT [B, QUERIES, HEADS, VALUE] from its partial results."""
    row = tl.program_id(0).to(tl.int64)
    query = (row % QUERIES).to(tl.int32)
    head = row // QUERIES % HEADS
    batch = row // QUERIES // HEADS
    first, last = visible_range(
        LENGTHS, STARTS, batch, query, QUERIES, TOKENS, WINDOW, CAUSAL, HAS_LENGTHS, HAS_STARTS
    )
    wide = tl.arange(0, BLOCK_V)
    top = tl.full((), -float("inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    sums = tl.full((BLOCK_V,), 0.0, tl.float32)
    end = tl.maximum((last + chunk - 1) // chunk, 0)
    rows = BATCH * HEADS * QUERIES
    for at in range(first // chunk, end, BLOCK_C):
        part = at + tl.arange(0, BLOCK_C)
        place = part.to(tl.int64) * rows + row
        score = tl.load(LSE + place, mask=part < end, other=-float("inf"))
        seen = score > -float("inf")
        mask = seen[:, None] & (wide < VALUE)[None, :]
        parts = tl.load(PARTS + place[:, None] * VALUE + wide[None, :], mask=mask, other=0.0)
        higher = tl.maximum(top, tl.max(score, 0))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        share = tl.exp(score - base)
        kept = tl.exp(top - base)
        sums = sums * kept + tl.sum(parts * share[:, None], 0)
        total = total * kept + tl.sum(share, 0)
        top = higher
    result = tl.where(total > 0, sums / tl.where(total > 0, total, 1.0), 0.0)
    place = ((batch * QUERIES + query) * HEADS + head) * VALUE
    tl.store(OUT + place + wide, result.to(OUT.dtype.element_ty), mask=wide < VALUE)
