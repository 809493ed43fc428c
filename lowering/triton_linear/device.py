"""Device functions of the portable linear kernel, in Triton.

Their text goes into each kernel that Inductor generates, so nothing here may refer to another
module than triton, and constants are written out.

A residency is the record of a tiered buffer in device memory: eight 64-bit words (see
`dak_inductor.lowering.residency`). It is read when the kernel runs, so one compiled kernel, and one
captured CUDA graph, serves every split.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def local_rows(weight, residency, pitch, rows):
    """Rows of a matrix that lie wholly before the split: its rows start every `pitch` elements."""
    split = tl.load(residency)
    base = tl.load(residency + 5)
    start = tl.where(base == 0, 0, weight.to(tl.int64) - base)
    row_bytes = pitch * (weight.dtype.element_ty.primitive_bitwidth // 8)
    local = tl.maximum(split - start, 0) // row_bytes
    return tl.minimum(local, rows).to(tl.int32)


@triton.jit
def reading_programs(residency, bytes_in_flight, default_window):
    """Programs that fill the window when each keeps `bytes_in_flight` bytes under way."""
    window = tl.full((), default_window, tl.int32)
    address = tl.load(residency + 6)
    if address != 0:
        window = tl.load(address.to(tl.pointer_type(tl.int32)))
    return tl.maximum(window // bytes_in_flight, 1)


@triton.jit
def tile_range(program, programs, readers, first_remote, tiles):
    """First, end and step of the tiles of one program; [first_remote, tiles) are the remote ones.

    The first programs, `readers` at most, take the remote tiles and nothing else: they start with
    the grid, and no more of the link than the window is ever asked for. The others take the local
    tiles. Two programs at least where there are tiles of both kinds.
    """
    spare = tl.where(first_remote == 0, programs, programs - 1)
    readers = tl.minimum(tl.minimum(readers, tiles - first_remote), spare)
    remote = program < readers
    start = tl.where(remote, first_remote + program, program - readers)
    stop = tl.where(remote, tiles, first_remote)
    step = tl.where(remote, readers, tl.maximum(programs - readers, 1))
    return start, stop, step


@triton.jit
def count(residency, program, local_bytes, remote_bytes, in_flight):
    """Add one call to the record's counters, by one program."""
    if program == 0:
        tl.atomic_add(residency + 1, local_bytes)
        tl.atomic_add(residency + 2, remote_bytes)
        tl.atomic_add(residency + 3, 1)
        tl.atomic_max(residency + 4, tl.where(remote_bytes > 0, in_flight, 0).to(tl.int64))


@triton.jit
def accumulate(
    accumulator,
    x_rows,
    weight_columns,
    k,
    K,
    x_step,
    k_step,
    n_inside,
    BLOCK_K: tl.constexpr,
    MASK_K: tl.constexpr,
    MASK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the product over [k, k + BLOCK_K) to an accumulator of [BLOCK_M, BLOCK_N].

    `x_rows` [BLOCK_M, 1] and `weight_columns` [1, BLOCK_N] point at k = 0. MASK_N asks for MASK_K.
    """
    at = k + tl.arange(0, BLOCK_K)
    x_tile = x_rows + at[None, :] * x_step
    weight_tile = weight_columns + at[:, None].to(tl.int64) * k_step
    k_inside = at < K
    a = tl.load(x_tile, mask=k_inside[None, :], other=0.0) if MASK_K else tl.load(x_tile)
    if MASK_N:
        b = tl.load(weight_tile, mask=k_inside[:, None] & n_inside[None, :], other=0.0)
    elif MASK_K:
        b = tl.load(weight_tile, mask=k_inside[:, None], other=0.0)
    else:
        b = tl.load(weight_tile)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def product_out_in(
    x,
    weight,
    tile_m,
    tile_n,
    M,
    N,
    K,
    x_pitch,
    x_step,
    pitch,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of x [M, K] times the transpose of weight [N, K]."""
    # Rows past the end read the last row again, which costs no mask and touches nothing outside.
    m = tl.minimum(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)
    n = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    x_rows = x + m[:, None].to(tl.int64) * x_pitch
    weight_columns = weight + n[None, :].to(tl.int64) * pitch
    accumulator = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for k in range(0, K, BLOCK_K):
        accumulator = accumulate(
            accumulator, x_rows, weight_columns, k, K, x_step, 1, n < N,
            BLOCK_K, not EVEN_K, False, PRECISION,
        )  # fmt: skip
    return accumulator


@triton.jit
def product_in_out(
    x,
    weight,
    tile_m,
    tile_n,
    M,
    N,
    K,
    local_k,
    remote_first,
    x_pitch,
    x_step,
    pitch,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    REMOTE_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of x [M, K] times weight [K, N], whose rows are remote from `local_k` on.

    Every tile needs remote rows here, so every program reads some: each has one small load of
    REMOTE_K rows under way, which is what bounds the window. `remote_first` lets half of the
    programs read the link while the other half reads local memory.
    """
    m = tl.minimum(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows = x + m[:, None].to(tl.int64) * x_pitch
    weight_columns = weight + n[None, :]
    accumulator = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    early_stop = tl.where(remote_first, K, local_k)
    late_start = tl.where(remote_first, K, local_k)
    for k in tl.range(local_k, early_stop, REMOTE_K, num_stages=1):
        accumulator = accumulate(
            accumulator, x_rows, weight_columns, k, K, x_step, pitch, n < N,
            REMOTE_K, True, not EVEN_N, PRECISION,
        )  # fmt: skip
    for k in range(0, local_k, BLOCK_K):
        accumulator = accumulate(
            accumulator, x_rows, weight_columns, k, local_k, x_step, pitch, n < N,
            BLOCK_K, True, not EVEN_N, PRECISION,
        )  # fmt: skip
    for k in tl.range(late_start, K, REMOTE_K, num_stages=1):
        accumulator = accumulate(
            accumulator, x_rows, weight_columns, k, K, x_step, pitch, n < N,
            REMOTE_K, True, not EVEN_N, PRECISION,
        )  # fmt: skip
    return accumulator
