"""How long the stock GEMM computes: whole waves of tiles, or what the GPU sustains.

The constants are fitted to the H200: bf16, CUDA-graph replays back to back, M of 256 to 2048.
"""

from __future__ import annotations

import math
from functools import lru_cache

_TOKENS = 128  # of a tile
_TILE_SHAPES = ((256, 0.98), (192, 0.98), (128, 0.88), (64, 0.73))
"""Features of a tile of the stock GEMM, and how near an SM comes to its share of the peak."""
_K_PARTS = (1, 2, 4, 8, 16)
"""Where tiles are few cuBLAS cuts K. Kernels of [1024 x 512], K = 14336 take 25 us (28 by this
estimate), of [512 x 1536], K = 8192 26 (24), of [512 x 256], K = 4096 7 (6); but of [2048 x 256],
K = 8192, alone, 31 (18)."""
_SUM_SECONDS = 2e-6  # to launch what adds up the parts


@lru_cache(maxsize=4096)
def compute_seconds(
    m: int, n: int, k: int, *, peak: float, sustained: float, sm_count: int, hbm_bandwidth: float
) -> float:
    """Of [m, k] by [n, k]. `peak` is the matmul rate in flop/s, `sustained` the share of it that
    all SMs keep up; HBM is read for sums of parts."""
    waves = min(
        _waves_seconds(m, n, k, width, share * peak / sm_count, parts, sm_count, hbm_bandwidth)
        for width, share in _TILE_SHAPES
        for parts in _K_PARTS
    )
    return max(waves, 2 * m * n * k / (sustained * peak))


def _waves_seconds(
    m: int,
    n: int,
    k: int,
    width: int,
    sm_rate: float,
    parts: int,
    sm_count: int,
    hbm_bandwidth: float,
) -> float:
    """Tiles of `width` features, each with K in parts; K is cut only where one wave does them."""
    tiles = math.ceil(m / _TOKENS) * math.ceil(n / width) * parts
    if parts > 1 and tiles > sm_count:
        return math.inf
    waves = math.ceil(tiles / sm_count)
    seconds = waves * 2 * _TOKENS * width * k / parts / sm_rate
    if parts == 1:
        return seconds
    sums = 2 * 4 * parts * m * n  # bytes of fp32 sums, written and read
    return seconds + _SUM_SECONDS + sums / hbm_bandwidth
