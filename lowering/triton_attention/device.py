"""Device functions of the portable attention kernels, in Triton.

A tile has BLOCK_M rows: the query heads that share a key head, for some queries. Row r of a group
is query r // GROUP of head r % GROUP of the group, so that keys are read once for all of them.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def visible_range(
    LENGTHS,
    STARTS,
    batch,
    query,
    QUERIES,
    TOKENS,
    WINDOW,
    CAUSAL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """First token that queries see, and the one behind the last they see; may be empty."""
    length = query * 0 + TOKENS
    if HAS_LENGTHS:
        length = tl.minimum(query * 0 + tl.load(LENGTHS + batch), TOKENS)
    first = query * 0
    if HAS_STARTS:
        first = tl.maximum(query * 0 + tl.load(STARTS + batch), 0)
    position = length - QUERIES + query
    stop = tl.minimum(position + 1, length) if CAUSAL else length
    first = tl.where(WINDOW > 0, tl.maximum(first, position - WINDOW + 1), first)
    return first, stop


@triton.jit
def attend(
    top,
    total,
    sums,
    q,
    key,
    value,
    key_step,
    value_step,
    start,
    stop,
    low,
    first,
    last,
    scale,
    softcap,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take tokens [start, stop) into running maxima, totals and sums of the rows of a tile.

    Row r sees tokens [first[r], last[r]), of which none is below `low`; what no row sees is not
    read, since it may be anything. Without MASKED every row sees all of them, and they are a
    multiple of BLOCK_N. Scores are kept times log2(e), for exp2.
    """
    dim = tl.arange(0, BLOCK_D)
    wide = tl.arange(0, BLOCK_V)
    for n in range(start, stop, BLOCK_N):
        token = n + tl.arange(0, BLOCK_N)
        far = token.to(tl.int64)
        keys = key + far[None, :] * key_step + dim[:, None]
        values = value + far[:, None] * value_step + wide[None, :]
        inside = (token >= low) & (token < stop)
        if MASKED:
            k = tl.load(keys, mask=inside[None, :] & (dim < HEAD)[:, None], other=0.0)
            v = tl.load(values, mask=inside[:, None] & (wide < VALUE)[None, :], other=0.0)
        elif HEAD == BLOCK_D and VALUE == BLOCK_V:
            k = tl.load(keys)
            v = tl.load(values)
        else:
            k = tl.load(keys, mask=(dim < HEAD)[:, None], other=0.0)
            v = tl.load(values, mask=(wide < VALUE)[None, :], other=0.0)
        score = tl.dot(q, k, input_precision=PRECISION) * scale
        if SOFTCAP:
            # tanh by exp, which saturates on both sides without an overflow
            folded = tl.exp2(-2.885390081777927 * tl.abs(score) / softcap)
            bent = (1.0 - folded) / (1.0 + folded) * softcap
            score = tl.where(score < 0, -bent, bent)
        score = score * 1.4426950408889634
        if MASKED:
            seen = (token[None, :] >= first[:, None]) & (token[None, :] < last[:, None])
            score = tl.where(seen & inside[None, :], score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        weight = tl.exp2(score - base[:, None])
        kept = tl.exp2(top - base)
        total = total * kept + tl.sum(weight, 1)
        sums = tl.dot(weight.to(v.dtype), v, sums * kept[:, None], input_precision=PRECISION)
        top = higher
    return top, total, sums


@triton.jit
def finished(top, total, sums):
    """Results of rows and their natural log-sum-exp: zeros and -inf for those that saw nothing."""
    seen = total > 0
    kept = tl.where(seen, total, 1.0)
    lse = tl.where(seen, (top + tl.log2(kept)) * 0.6931471805599453, -float("inf"))
    return tl.where(seen[:, None], sums / kept[:, None], 0.0), lse


@triton.jit
def local_tokens(pointer, record, token_bytes, segment_bytes, TOKENS, TOKEN_MAJOR: tl.constexpr):
    """Where the split of a tensor of keys or values lies: the segment, and the token in it.

    Token-major memory is one segment. Tokens before that one, and segments before that one, are
    wholly local. `spare` bytes of that token are local too, in token-major memory.
    """
    base = tl.load(record + 5)
    start = tl.where(base == 0, 0, pointer.to(tl.int64) - base)
    local = tl.maximum(tl.load(record) - start, 0)
    if TOKEN_MAJOR:
        token = tl.minimum(local // token_bytes, TOKENS)
        spare = tl.where(token == TOKENS, 0, local - token * token_bytes)
        return token * 0, token.to(tl.int32), spare
    segment = tl.minimum(local // segment_bytes, 1 << 30)
    token = tl.minimum((local - segment * segment_bytes) // token_bytes, TOKENS)
    return segment, token.to(tl.int32), token.to(tl.int64) * 0


@triton.jit
def tier_bytes(
    pointer,
    record,
    first,
    stop,
    batch,
    batches,
    HEADS,
    token_bytes,
    segment_bytes,
    head_bytes,
    TOKENS,
    TOKEN_MAJOR: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Local bytes and all bytes when tokens [first, stop) of each sequence are read.

    `first`, `stop`: [BLOCK_B], of sequences `batch`, which count where they are below `batches`.
    `head_bytes` are those of a token of one head.
    """
    tokens = tl.where(batch < batches, tl.maximum(stop - first, 0), 0).to(tl.int64)
    everything = tl.sum(tokens) * HEADS * head_bytes
    _, token, spare = local_tokens(pointer, record, token_bytes, segment_bytes, TOKENS, TOKEN_MAJOR)
    if TOKEN_MAJOR:
        whole = tl.minimum(tl.maximum(token - first, 0).to(tl.int64), tokens)
        width = HEADS * head_bytes
        cut = tl.minimum(tl.maximum(spare - batch.to(tl.int64) * width, 0), width)
        inside = (token >= first) & (token < stop) & (batch < batches)
        return tl.sum(whole * width + tl.where(inside, cut, 0)), everything
    base = tl.load(record + 5)
    start = tl.where(base == 0, 0, pointer.to(tl.int64) - base)
    head = tl.arange(0, BLOCK_H)
    pair = batch.to(tl.int64)[:, None] * HEADS + head[None, :]
    begin = start + pair * segment_bytes + first.to(tl.int64)[:, None] * head_bytes
    size = tl.where((head < HEADS)[None, :], tokens[:, None] * head_bytes, 0)
    local = tl.minimum(tl.maximum(tl.load(record) - begin, 0), size)
    return tl.sum(tl.sum(local, 1)), everything
