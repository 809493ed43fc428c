"""How long the products and copies of the staged path take, from the profile.

The constants are fitted to the H200: bf16, CUDA-graph replays back to back, M of 256 to 2048. Of 24
whole products (28672 x 8192, 8192 x 28672, 4096 x 14336, 6144 x 4096, 4096 x 4096, 7168 x 2048) 18
are met within 6%. 8192 x 28672 is 13% and 9% low with 256 and 512 tokens, 6144 x 4096 and 7168 x
2048 are 18% and 11% high with 256.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

from dak_inductor.cost_model import peak_flops
from dak_inductor.hardware_profile import HardwareProfile, LinkProfile
from dak_inductor.lowering.copy_cost import device_copy_seconds, link_copy_seconds
from dak_inductor.lowering.element_types import ELEMENT_BYTES
from dak_inductor.lowering.linear.problem import LinearProblem

if TYPE_CHECKING:
    from dak_inductor.lowering.linear.ring_plan import Part, Residency

_PRODUCT_SECONDS = 4e-6  # of a product: its launch, and the memset of cuBLAS ahead of it
_TOKENS = 128  # of a tile
_TILE_SHAPES = ((256, 0.98), (192, 0.98), (128, 0.88), (64, 0.73))
"""Features of a tile of the stock GEMM, and how near an SM comes to its share of the peak."""
_SUSTAINED = 0.89
"""Of the peak by all SMs for long: 730 of 800 TFLOP/s in products of 1.3 ms, 700 with K = 28672."""
_K_PARTS = (1, 2, 4, 8, 16)
"""Where tiles are few cuBLAS cuts K. Kernels of [1024 x 512], K = 14336 take 25 us (28 by this
estimate), of [512 x 1536], K = 8192 26 (24), of [512 x 256], K = 4096 7 (6); but of [2048 x 256],
K = 8192, alone, 31 (18)."""
_SUM_SECONDS = 2e-6  # to launch what adds up the parts


class RingTiming:
    """How long copies and products of parts take; few differ."""

    def __init__(
        self,
        problem: LinearProblem,
        residency: tuple[Residency, ...],
        profile: HardwareProfile,
        link: LinkProfile,
    ) -> None:
        self.multiply = lru_cache(lambda features: multiply_seconds(problem, features, profile))
        self._copy = lru_cache(
            lambda local, remote: (
                device_copy_seconds(local * ELEMENT_BYTES, profile)
                + link_copy_seconds(remote * ELEMENT_BYTES, profile, link)
            )
        )
        self._problem, self._residency = problem, residency
        passes = 5 if problem.gated else 0  # over the result: activation and product, in place
        self.epilogue = passes * problem.m * problem.n * ELEMENT_BYTES / profile.hbm_bandwidth

    def copy(self, part: Part) -> float:
        """Local rows of what is staged are copied too, with a row that the split cuts."""
        begins_local = self._residency[part.weight].remote
        if self._problem.in_out:
            remote = self._problem.k - begins_local
            return self._copy(begins_local * part.features, remote * part.features)
        local = min(max(begins_local, part.start), part.stop) - part.start
        return self._copy(local * self._problem.k, (part.features - local) * self._problem.k)


def multiply_seconds(problem: LinearProblem, features: int, profile: HardwareProfile) -> float:
    """The stock GEMM over that many features of one weight: whole waves of tiles, what the GPU
    sustains, or HBM."""
    peak = peak_flops(profile, str(problem.dtype).removeprefix("torch."))
    sustained = 2 * problem.m * features * problem.k / (_SUSTAINED * peak)
    elements = problem.k * (problem.m + features) + problem.m * features
    stream = elements * ELEMENT_BYTES / profile.hbm_bandwidth
    waves = min(
        _waves_seconds(problem, features, width, share * peak / profile.sm_count, parts, profile)
        for width, share in _TILE_SHAPES
        for parts in _K_PARTS
    )
    return _PRODUCT_SECONDS + max(waves, sustained, stream)


def _waves_seconds(
    problem: LinearProblem,
    features: int,
    width: int,
    sm_rate: float,
    parts: int,
    profile: HardwareProfile,
) -> float:
    """Tiles of `width` features, each with K in parts; K is cut only where one wave does them."""
    tiles = math.ceil(problem.m / _TOKENS) * math.ceil(features / width) * parts
    if parts > 1 and tiles > profile.sm_count:
        return math.inf
    waves = math.ceil(tiles / profile.sm_count)
    seconds = waves * 2 * _TOKENS * width * problem.k / parts / sm_rate
    if parts == 1:
        return seconds
    sums = 2 * 4 * parts * problem.m * features  # bytes of fp32 sums, written and read
    return seconds + _SUM_SECONDS + sums / profile.hbm_bandwidth
