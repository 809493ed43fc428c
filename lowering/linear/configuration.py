"""Configurations of the kernel `tiered_linear`: which there are, which are legal, which is best.

One configuration serves every split: where bytes lie decides only which of them is fastest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from dak_inductor.cost_model import FEW_TOKENS, peak_flops
from dak_inductor.cuda_runtime.nvrtc import KernelInstance, instance
from dak_inductor.hardware_profile import HardwareProfile, LinkProfile
from dak_inductor.lowering.linear.problem import LinearProblem

# kernels/linear/layout.cuh
THREADS = 384
CONSUMER_WARPGROUPS = 2
HEAD_BYTES = 1024
DEPTH = 64
MAXIMUM_STAGES = 16
SHARED_BYTES = 227 * 1024  # of an SM, for one CTA
SHARED_BYTES_OF_TWO = 113 * 1024
ROW_BYTES = 128
FEW_ROWS = (8, 16, 32, 64)  # boxes for tiles that lack rows
TURN_PITCH = 68

TOKEN_TILES = (8, 16, 32, 64, 128, 256)
MAXIMUM_CLUSTER = 16
MAXIMUM_TOKENS = MAXIMUM_CLUSTER * TOKEN_TILES[-1]
DECODE_TOKENS = FEW_TOKENS
"""Up to this many tokens one CTA holds all of them."""
WORKER_BYTES = 32 * 1024
"""That each of many remote workers has on their way. An SM has no more than 16 KiB of a host's
memory under way, 7 GB/s, whatever it asks for: 8 of them fill a PCIe link, and with twice that
asked for each they are within the window."""
FEW_ROWS_SECONDS = 1.1e-6
"""That a step of a remote tile that lacks rows takes a CTA at least: 0.8 to 1.2 us on the H200, of
host memory as of another GPU's, for 8 rows as for 96, whatever is in flight."""


@dataclass(frozen=True, slots=True)
class LinearConfiguration:
    """Template arguments and launch shape.

    A CTA's tile is `tokens` columns by 64 * 2 * `blocks` weight rows, and `cluster` CTAs share each
    weight tile. Where it is `paired` an SM holds two CTAs, so that the next launch can start beside
    this one.
    """

    tokens: int
    blocks: int
    cluster: int
    gated: bool
    in_out: bool
    half: bool
    paired: bool = False

    @property
    def rows(self) -> int:
        """Weight rows of a stage."""
        return 64 * CONSUMER_WARPGROUPS * self.blocks

    @property
    def features(self) -> int:
        """Output features of a tile."""
        return self.rows // 2 if self.gated else self.rows

    @property
    def weight_stage_bytes(self) -> int:
        return self.rows * ROW_BYTES

    @property
    def stage_bytes(self) -> int:
        return self.weight_stage_bytes + self.tokens * ROW_BYTES

    @property
    def turn_bytes(self) -> int:
        """Shared memory in which sums turn around in the epilogue."""
        tokens = min(self.tokens, 16 if self.gated else 32)
        return CONSUMER_WARPGROUPS * tokens * TURN_PITCH * 4 * (2 if self.gated else 1)

    @property
    def stages(self) -> int:
        room = SHARED_BYTES_OF_TWO if self.paired else SHARED_BYTES
        return min(MAXIMUM_STAGES, (room - HEAD_BYTES - self.turn_bytes) // self.stage_bytes)

    @property
    def shared_bytes(self) -> int:
        return HEAD_BYTES + self.stages * self.stage_bytes + self.turn_bytes

    @property
    def partial_bytes(self) -> int:
        """fp32 sums of one unfinished tile of one cluster."""
        return self.rows * self.tokens * 4 * self.cluster

    def tiles(self, problem: LinearProblem) -> int:
        return math.ceil(problem.n / self.features)

    def kernel(self, *, bounded_waits: bool = False) -> KernelInstance:
        """The instance to compile. All cluster sizes above 1 share one."""
        return instance(
            "tiered_linear",
            tokens=self.tokens,
            blocks=self.blocks,
            stages=self.stages,
            ctas_per_sm=2 if self.paired else 1,
            cluster=self.cluster > 1,
            gated=self.gated,
            in_out=self.in_out,
            half=self.half,
            bounded_waits=bounded_waits,
        )


def refusal(problem: LinearProblem, configuration: LinearConfiguration) -> str | None:
    """Why this configuration cannot compute this problem; None where it can."""
    if configuration.tokens * configuration.cluster < problem.m:
        return f"{configuration.cluster} CTAs of {configuration.tokens} tokens hold no {problem.m}"
    if configuration.paired and configuration.cluster > 1:
        return "clusters take whole SMs"
    if configuration.gated and configuration.blocks != 2:
        return "a gated product needs two blocks, one of each weight"
    decode = configuration.cluster == 1 and configuration.tokens <= DECODE_TOKENS
    if configuration.blocks == 2 and decode and not configuration.gated:
        return "in decode more, smaller stages are faster (3 to 8 us of 115 at 64 and 128 tokens)"
    # two m64n256 blocks would need 256 registers for sums alone
    if configuration.blocks * configuration.tokens > 256:
        return f"{configuration.blocks} blocks of {configuration.tokens} tokens exceed registers"
    if configuration.paired and configuration.tokens * configuration.blocks > 32:
        return "two CTAs of an SM have 80 registers a thread: enough for 32 tokens"
    if configuration.stages < 2:
        return f"{configuration.stages} stages of {configuration.stage_bytes} bytes fit"
    return None


def _token_tiles(m: int) -> tuple[int, ...]:
    """In decode the one that holds all tokens in one CTA, else those that a cluster reaches."""
    if m <= DECODE_TOKENS:
        return (next(tile for tile in TOKEN_TILES if tile >= m),)
    return tuple(tile for tile in TOKEN_TILES if m <= MAXIMUM_CLUSTER * tile)


def configurations(problem: LinearProblem) -> Iterator[LinearConfiguration]:
    """All legal configurations for `problem`."""
    half = problem.dtype == torch.float16
    for tokens in _token_tiles(problem.m):
        cluster = math.ceil(problem.m / tokens)
        for blocks, paired in ((1, False), (2, False), (1, True), (2, True)):
            found = LinearConfiguration(
                tokens, blocks, cluster, problem.gated, problem.in_out, half, paired
            )
            if refusal(problem, found) is None:
                yield found


# Rates of one SM of a Hopper card, for comparing configurations with each other.
_FILL_BYTES = 95e9  # L2 to shared memory, bytes/s, multicast included
_REDUCE_BYTES = 60e9  # partial sums to device memory and back
_STEP_SECONDS = 30e-9  # barriers and issue of one step
LATE_SECONDS = 7e-6
"""How much later than the others the worker started last has its first step: its SM is free when
the launch ahead has ended, theirs are before that. Measured on the H200."""
_LAUNCH_SECONDS = 5e-6  # until the first step and after the last one


def estimate(
    problem: LinearProblem,
    configuration: LinearConfiguration,
    profile: HardwareProfile,
    workers: int,
) -> float:
    """Seconds with everything local: what tells good configurations from bad ones."""
    if workers == 0:
        return math.inf
    steps = math.ceil(problem.k / DEPTH) * configuration.tiles(problem)
    compute = steps / workers * (step_seconds(configuration, profile) + _STEP_SECONDS)
    # the worker that finishes a tile adds the pieces of the others, one after the other
    pieces = 1 + math.ceil(workers / configuration.tiles(problem))
    reduce = pieces * piece_seconds(configuration)
    return max(compute, problem.weight_bytes / profile.hbm_bandwidth) + reduce + _LAUNCH_SECONDS


def choose(
    problem: LinearProblem,
    profile: HardwareProfile,
    workers: Callable[[LinearConfiguration], int],
    *,
    may_pair: bool = False,
) -> LinearConfiguration | None:
    """The best configuration; None where M is too large or no cluster fits.

    `workers` says how many clusters of a configuration the device holds at once. Two CTAs to an SM
    (`may_pair`) are for weights that are all local, one product right behind the other. CTAs that
    end early, as those of the smaller part do, let CTAs of the next launch crowd on their SMs, and
    that launch is only as fast as those (measured: 1.4 times the time at 0.5% remote). Where CTAs
    of a kernel between two products hold some SMs, they crowd on the others (1.2 times with 14336 x
    4096).
    """
    found = [
        (estimate(problem, configuration, profile, count), configuration)
        for configuration in configurations(problem)
        if configuration.paired == (may_pair and _can_pair(problem, configuration))
        and (count := workers(configuration)) > 0
    ]
    return min(found, key=lambda pair: pair[0])[1] if found else None


def step_seconds(configuration: LinearConfiguration, profile: HardwareProfile) -> float:
    """Time of one step of a worker that has its data in L2 or HBM, all SMs at work."""
    rate = peak_flops(profile, "bfloat16") / profile.sm_count
    multiply = 2 * configuration.rows * configuration.tokens * DEPTH / rate
    fill = configuration.stage_bytes / _FILL_BYTES
    stream = configuration.weight_stage_bytes * profile.sm_count / profile.hbm_bandwidth
    return max(multiply, fill, stream / configuration.cluster)


def piece_seconds(configuration: LinearConfiguration) -> float:
    """Time in which a CTA adds up a piece of a tile that another worker left."""
    return configuration.partial_bytes / configuration.cluster / _REDUCE_BYTES


def _can_pair(problem: LinearProblem, configuration: LinearConfiguration) -> bool:
    return refusal(problem, replace(configuration, paired=True)) is None


def direct_seconds(
    problem: LinearProblem,
    configuration: LinearConfiguration,
    profile: HardwareProfile,
    link: LinkProfile,
    *,
    workers: int,
    remote_bytes: int,
) -> float:
    """Estimated time of a launch with that many bytes in the remote tier."""
    return max(
        estimate(problem, configuration, profile, workers), remote_bytes / link.direct_bandwidth
    )


def most_remote_workers(
    configuration: LinearConfiguration,
    profile: HardwareProfile,
    link: LinkProfile,
    *,
    window: int,
    workers: int,
) -> int:
    """Workers, of `workers`, that may read remote memory: enough to fill the link, no more.

    One alone holds too little in flight or computes too slowly; too many would wait for the link
    while their SMs could compute, and leave HBM to too few others. Over NVLink 28672 x 8192 at 7.5%
    took 140 us with 62 of 132 reading, 118 with 33, and 105 with 16 that have twice as much in
    flight each.
    """
    rate = configuration.weight_stage_bytes / step_seconds(configuration, profile)
    for_link = math.ceil(link.direct_bandwidth / rate)
    # twice, since workers with the few rows of a last tile have less in flight
    for_window = 2 * window // WORKER_BYTES
    if configuration.cluster == 1:
        for_window = min(for_window, round(_MOST_READERS[_is_fast(link)] * workers))
    return min(workers, max(1, for_link, for_window))


_MOST_READERS = (1 / 4, 1 / 8)
"""Of the workers, on a slow link and on a fast one: an SM streams HBM at up to 1.5 times its share
(H200)."""
_READERS = 8
_READER_BYTES = 30e9


def _is_fast(link: LinkProfile) -> bool:
    """Whether one SM cannot read an eighth of what the link carries."""
    return link.direct_bandwidth / _READERS > _READER_BYTES


def worker_bytes(link: LinkProfile) -> int:
    """That one remote worker may have on its way where few are: more of a fast link."""
    return 2 * WORKER_BYTES if _is_fast(link) else WORKER_BYTES


def reader_bandwidth(link: LinkProfile) -> float:
    """What one worker reads of the link, bytes/s.

    On the H200 7 GB/s of host memory: boxes of 128 rows are requests of 128 bytes each, and an SM
    issues only so many (bulk copies of whole 8 KiB pieces reach 28 GB/s).
    """
    return min(link.direct_bandwidth / _READERS, _READER_BYTES)
