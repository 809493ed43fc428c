"""How long the products and copies of the staged path take, from the profile.

The constants are fitted to the H200: bf16, CUDA-graph replays back to back, M of 256 to 2048. Of 24
whole products (28672 x 8192, 8192 x 28672, 4096 x 14336, 6144 x 4096, 4096 x 4096, 7168 x 2048) 18
are met within 6%. 8192 x 28672 is 13% and 9% low with 256 and 512 tokens, 6144 x 4096 and 7168 x
2048 are 18% and 11% high with 256.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from dak_inductor.cost_model import peak_flops
from dak_inductor.gemm_time import compute_seconds
from dak_inductor.hardware_profile import HardwareProfile, LinkProfile
from dak_inductor.lowering.copy_cost import device_copy_seconds, link_copy_seconds
from dak_inductor.lowering.element_types import ELEMENT_BYTES
from dak_inductor.lowering.linear.problem import LinearProblem

if TYPE_CHECKING:
    from dak_inductor.lowering.linear.ring_plan import Part, Residency

_PRODUCT_SECONDS = 4e-6  # of a product: its launch, and the memset of cuBLAS ahead of it
_SUSTAINED = 0.89
"""Of the peak by all SMs, one product after the other: 730 of 800 TFLOP/s in products of 1.3 ms,
700 with K = 28672."""


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
    """The stock GEMM over that many features of one weight: its products, or HBM."""
    computed = compute_seconds(
        problem.m,
        features,
        problem.k,
        peak=peak_flops(profile, str(problem.dtype).removeprefix("torch.")),
        sustained=_SUSTAINED,
        sm_count=profile.sm_count,
        hbm_bandwidth=profile.hbm_bandwidth,
    )
    elements = problem.k * (problem.m + features) + problem.m * features
    return _PRODUCT_SECONDS + max(computed, elements * ELEMENT_BYTES / profile.hbm_bandwidth)
