"""What an operator and a step take, given how much of each tensor is remote.

An operator that touches D bytes of a tensor, reads or writes A bytes of activations and does F
flops, with a share x of the tensor remote and read directly, takes

    T(x) = max(((1 - x) D + A) / B_local, x D / B_remote, F / P) + floor

because the link, HBM and the tensor cores work side by side. B_local and P are what operators reach
of the profile's peaks, and the floor what they take besides. T is convex and piecewise linear in x.
B_remote is what direct reads get of the link, or where products of many tokens read rows that the
copy engine brings, the more of the two. What an operator takes longer as soon as it reads both
memories (`both_seconds`) is no part of T.
Where a share u at the tensor's end is not touched yet (the context still to come of a KV cache),
the first u of x costs nothing, and T(x) = max(D + A over B_local, y D / B_remote, F / P) with
y = (x - u) / (1 - u): what HBM gains by remote reads is left out, which keeps T convex.
Bytes, bytes per second, flop per second, seconds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from dak_inductor import gemm_time
from dak_inductor.errors import PlanError
from dak_inductor.hardware_profile import HardwareProfile, LinkProfile
from dak_inductor.plan import OpUse

HBM_SHARE = 0.93
"""Of the stream that a profile has, what operators reach. Fitted, with the floor, to the decode
grids of the H200, both tiers (linear.json, linear_peer.json): see `benchmarks/check_cost_model.py`.
"""
COMPUTE_SHARE, ATTENTION_COMPUTE_SHARE = 0.92, 0.7
"""Of the matmul rate that a profile has, what operators reach; attention's two products with a
softmax between them."""
_SUSTAINED = 0.86
"""The same of products of many tokens, where whole waves of tiles take no longer: 650 to 730 of 800
TFLOP/s in the middle of steps. Fitted to the prefill grids and to prefill steps."""
PRODUCTS = ("linear", "linear_epilogue", "gated_linear")
FUSED = "fused"
"""All that Inductor makes one kernel of: it reads and writes activations, and computes next to
nothing."""
_SHORT = ("embedding", "gather", FUSED)
FEW_TOKENS = 128
"""Products of up to so many are one launch of the kernel."""
_ALONE_FLOORS = {"cpu": 2.5, "peer": 4.0}
"""What such a product takes longer in a step, in floors of the profile by tier, once it reads the
link itself: with nothing remote its start and its end lie beside its neighbours. Measured on the
H200 in decode steps of 8 Llama-3-8B layers: 3 to 6 us with 0.5 and 1% in host memory, 7 to 8.5 with
2 and 5% in another GPU's. In calls one by one, as T is fitted to, neither does."""
_DIVIDED_FLOORS = 6.0
"""What products of more tokens take longer, in steps or alone, once a part of their weight is
remote: copies, their events and one product more. 13 us is the median of both prefill grids for
weights of 29 to 117 MB and up to 10% remote, 17 for one of 8 MB. Where the stock operator takes
less, which reads remote bytes in place and again for each tile of tokens, it serves them."""
TOKENS_OF_TILE = 128
_BOTH_FLOORS = 3.0
"""The same of attention, whose workers for either memory end apart."""
_KERNEL_FLOORS = 2.65
"""What other operators take besides their bytes, in floors of the profile: launch, first tiles,
last sums."""


class OpCost(NamedTuple):
    """The lines of T, in seconds; `weight` is at x = 0 and `link` at x = 1."""

    weight: float  # D / B_local
    activations: float  # A / B_local
    link: float  # D / B_remote
    compute: float  # F / P
    untouched: float = 0.0  # u

    def touched(self, share: float) -> float:
        """The share of the touched bytes that is remote where `share` of the tensor is."""
        if not self.untouched:
            return share
        return max(0.0, share - self.untouched) / (1 - self.untouched)

    def time(self, share: float) -> float:
        """T(share) without the floor; `share` from 0 (all local) to 1 (all remote)."""
        return max(self._local(share), self.link * self.touched(share), self.compute)

    def _local(self, share: float) -> float:
        return self.weight * (1 if self.untouched else 1 - share) + self.activations

    def slopes(self) -> tuple[float, tuple[tuple[float, float], ...]]:
        """T as (slope at 0, ((share, jump of the slope there), ...)), shares within (0, 1)."""
        weight, activations, link, compute, untouched = self
        if weight <= 0 or link <= 0:  # nothing touched
            return 0.0, ()
        if untouched:
            flat = max(weight + activations, compute) / link
            slope = link / (1 - untouched)
            kink = (untouched + flat * (1 - untouched), slope)
            return 0.0, (kink,) if kink[0] < 1 else ()
        start = -weight
        if weight + activations <= compute:
            start = 0.0
            kinks: tuple[tuple[float, float], ...] = ((compute / link, link),)
        else:
            balance = (weight + activations) / (weight + link)
            if link * balance >= compute:
                kinks = ((balance, weight + link),)
            else:
                kinks = (
                    ((weight + activations - compute) / weight, weight),
                    (compute / link, link),
                )
        return start, tuple([kink for kink in kinks if kink[0] < 1])


def peak_flops(profile: HardwareProfile, dtype: str) -> float:
    """The matmul rate of `dtype`; of a 16-bit type for another, else the slowest rate known."""
    rates = profile.matmul_flops
    if dtype in rates:
        return rates[dtype]
    if dtype in ("float16", "bfloat16"):
        for other in ("bfloat16", "float16"):
            if other in rates:
                return rates[other]
    return min(rates.values())


def op_cost(use: OpUse, profile: HardwareProfile, link: LinkProfile) -> OpCost:
    """The lines of the use's T on this hardware. Raises PlanError for another strategy."""
    if use.strategy != "direct":
        raise PlanError(
            f"operator {use.op}: strategy {use.strategy!r} cannot be planned, only 'direct'"
        )
    bandwidth = local_bandwidth(profile)
    return OpCost(
        use.touched_bytes / bandwidth,
        use.other_bytes / bandwidth,
        use.touched_bytes / link_bandwidth(use, link),
        compute_seconds(use, profile),
        use.untouched_share,
    )


def op_time(use: OpUse, remote_share: float, profile: HardwareProfile, link: LinkProfile) -> float:
    """Seconds of one call with `remote_share` (0 to 1) of the tensor remote, floor included."""
    return op_cost(use, profile, link).time(remote_share) + op_floor(use.kind, profile)


def both_seconds(use: OpUse, share: float, profile: HardwareProfile, link: LinkProfile) -> float:
    """What one call takes longer than T since it reads both memories, in a step or alone."""
    if not 0 < share < 1:
        return 0.0
    if use.kind == "attention":
        return _BOTH_FLOORS * profile.operator_floor
    if use.kind not in PRODUCTS or use.m <= FEW_TOKENS:
        return 0.0
    in_place = share * use.touched_bytes * math.ceil(use.m / TOKENS_OF_TILE)
    return min(divided_seconds(profile), in_place / link.direct_bandwidth)


def divided_seconds(profile: HardwareProfile) -> float:
    """The same of a product of many tokens, at most."""
    return _DIVIDED_FLOORS * profile.operator_floor


def link_bandwidth(use: OpUse, link: LinkProfile) -> float:
    """Bytes per second at which remote bytes reach an operator."""
    if use.kind in PRODUCTS and use.m > FEW_TOKENS:
        return max(link.direct_bandwidth, link.copy_bandwidth)
    return link.direct_bandwidth


def local_bandwidth(profile: HardwareProfile) -> float:
    """Bytes per second that operators read of HBM."""
    return HBM_SHARE * profile.hbm_bandwidth


def compute_seconds(use: OpUse, profile: HardwareProfile) -> float:
    """Seconds of one call on the cores."""
    if not use.flops:
        return 0.0
    peak = peak_flops(profile, use.dtype)
    if use.kind in PRODUCTS and use.n and use.m > FEW_TOKENS:
        depth = round(use.flops / (2 * use.m * use.n))
        return gemm_time.compute_seconds(
            use.m, use.n, depth,
            peak=peak, sustained=_SUSTAINED, sm_count=profile.sm_count,
            hbm_bandwidth=profile.hbm_bandwidth,
        )  # fmt: skip
    share = ATTENTION_COMPUTE_SHARE if use.kind == "attention" else COMPUTE_SHARE
    return use.flops / (share * peak)


def op_floor(kind: str, profile: HardwareProfile) -> float:
    """Seconds of an operator of that kind besides what it reads and computes."""
    return profile.operator_floor * (1.0 if kind in _SHORT else _KERNEL_FLOORS)


def alone_seconds(m: int, share: float, profile: HardwareProfile, link: LinkProfile) -> float:
    """What a product of `m` tokens takes longer in a step that reads both memories itself; `share`
    is what is remote of its weight."""
    reads_both = 0 < m <= FEW_TOKENS and 0 < share < 1
    return both_memories_seconds(profile, link) if reads_both else 0.0


def both_memories_seconds(profile: HardwareProfile, link: LinkProfile) -> float:
    """The same of each product of few tokens that does."""
    return _ALONE_FLOORS.get(link.tier, _ALONE_FLOORS["cpu"]) * profile.operator_floor


def copy_slowdown(profile: HardwareProfile, link: LinkProfile) -> float:
    """How much longer work takes that reads HBM while the copy engine brings bytes in: what copies
    leave of HBM may still be more than operators reach."""
    lost = min(link.copy_interference * link.copy_bandwidth / profile.hbm_bandwidth, 0.5)
    return max(1.0, HBM_SHARE / (1 - lost))


def step_bound(
    local: float, remote: float, compute: float, profile: HardwareProfile, link: LinkProfile
) -> float:
    """The time no schedule of a graph's bytes can beat: each resource alone, never idle.

    max(local bytes / HBM, remote bytes / the faster of direct reads and copy engine, compute), no
    floors. `local`, `remote` and `compute` are sums over the graph, the last one of F / P.
    """
    best_link = max(link.direct_bandwidth, link.copy_bandwidth)
    return max(local / profile.hbm_bandwidth, remote / best_link, compute)
