"""Configurations of the kernel `tiered_attention`: which there are, which are legal, which is used.

One configuration serves every split, length and batch: sizes of the tensors decide it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dak_inductor.cuda_runtime.nvrtc import KernelInstance, instance
from dak_inductor.lowering.attention.problem import AttentionProblem
from dak_inductor.lowering.element_types import ELEMENT_BYTES

# kernels/attention/layout.cuh, units.cuh
THREADS = 384
CONSUMER_WARPGROUPS = 2
WARPGROUP_ROWS = 64
HEAD_BYTES = 11 * 1024
MAXIMUM_SLOTS = 16
MAXIMUM_BATCH = 512
SHARED_BYTES = 227 * 1024
BOX_TOKENS = (1, 2, 4, 8, 16, 32, 64)
MOST_CHUNKS = 4
MOST_AT_ONCE = 48
"""Results of a unit that one warpgroup adds up, 16 at a time; more of them in groups first. One
sequence of 131072 tokens with 1% remote leaves 246 to each of 4 units: 16 rounds, in groups two."""
NO_SWEEP = 1 << 30
SWEEP_BYTES = 8 << 20
"""Of keys, and of values, that a sweep of remote tokens goes over, unless it is one tile's."""
FASTEST_SWEPT = 100e9
"""Bytes per second of a link that is swept. A faster one brings a tile in less than the few us in
which its reader takes up the unit's sums; and of a peer's memory T / L is 1.01 unit by unit."""
FINEST_ROWS = 1
"""Tokens that copies are multiples of at their end, where the head size allows; 8 are an atom."""
_PAGE_BYTES = 2 << 20

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
MAXIMUM_QUERIES = 16
"""Of a sequence; more of them are prefill."""


@dataclass(frozen=True, slots=True)
class AttentionConfiguration:
    """Template arguments.

    `tile` tokens are multiplied at once. With two `teams` each consumer warpgroup of a CTA has work
    of its own, for up to 64 rows of queries; with one both share each tile, 64 rows each.
    """

    head_dim: int
    tile: int
    teams: int
    half: bool

    @property
    def row_bytes(self) -> int:
        return self.head_dim * ELEMENT_BYTES

    @property
    def slot_bytes(self) -> int:
        """Keys, or values, of a tile."""
        return self.tile * self.row_bytes

    @property
    def slots(self) -> int:
        """Of each team."""
        queries = CONSUMER_WARPGROUPS * WARPGROUP_ROWS * self.row_bytes
        room = SHARED_BYTES - HEAD_BYTES - queries
        return min(MAXIMUM_SLOTS, room // (self.teams * self.slot_bytes))

    @property
    def shared_bytes(self) -> int:
        queries = CONSUMER_WARPGROUPS * WARPGROUP_ROWS * self.row_bytes
        return HEAD_BYTES + queries + self.teams * self.slots * self.slot_bytes

    @property
    def warpgroups(self) -> int:
        """Of a team."""
        return CONSUMER_WARPGROUPS // self.teams

    @property
    def rows(self) -> int:
        """Queries of a head of keys that a team takes at once."""
        return self.warpgroups * WARPGROUP_ROWS

    def row_blocks(self, problem: AttentionProblem) -> int:
        """Parts that the queries of a head of keys are cut into; each reads the head's tokens."""
        return math.ceil(problem.rows / self.rows)

    def units(self, problem: AttentionProblem) -> int:
        return problem.batch * problem.kv_heads * self.row_blocks(problem)

    def most_chunks(self, problem: AttentionProblem) -> int:
        """That the end of a local run may be cut into: where results are large, few."""
        return MOST_CHUNKS if min(self.rows, problem.rows) <= 16 else 2

    def least_chunk(self, problem: AttentionProblem) -> int:
        """Tiles of a chunk, so that writing its result takes little of the time to read it."""
        return 2 + min(self.rows, problem.rows) // 8

    def partial_slots(self, problem: AttentionProblem, workers: int) -> int:
        """Unfinished results at most, whatever the lengths and splits (attention/slots.cuh)."""
        # of each line a slot for each unit and one for each part
        return 2 * self.units(problem) + workers * (1 + self.most_chunks(problem))

    def slot_floats(self, problem: AttentionProblem) -> int:
        """fp32 elements of an unfinished result: sums, and weights of its own and of its group."""
        rows = min(self.rows, problem.rows)
        return rows * self.head_dim + 2 * math.ceil(2 * rows / 4) * 4

    def counters(self, problem: AttentionProblem, workers: int) -> int:
        """Words that are zero between launches: claims, and arrivals at units and at groups."""
        places = self.units(problem)
        if self.partial_slots(problem, workers) > MOST_AT_ONCE:
            places += self.partial_slots(problem, workers)
        return 1 + places * self.warpgroups

    @property
    def finest_rows(self) -> int:
        """Copies end at multiples of so many tokens: boxes go to multiples of 128 bytes."""
        return max(FINEST_ROWS, 2 if self.head_dim % 64 == 16 else 1)

    def sweep_tokens(self, problem: AttentionProblem, *caches: tuple[int, int, int]) -> int:
        """Tokens of a sweep of the remote line (kernels/attention/walk.cuh), or NO_SWEEP.

        `caches`: of keys and of values, bytes from one head, sequence and token to the next.

        Sweeps are for caches that lie token by token, where a tile of one unit is in two pages or
        more. Unit by unit each of 24 readers would be in others, with a few rows from each, and
        pages looked up again and again. On the H200, all remote, T / L was 1.0 to 1.02 below that;
        1.06 with 64 KiB from token to token, 2.1 with 256 KiB, 2.6 with 1 MiB.
        """
        tokens = NO_SWEEP
        for head, sequence, token in caches:
            units = (problem.kv_heads - 1) * head + (problem.batch - 1) * sequence + self.row_bytes
            if units > token or self.tile * token < 2 * _PAGE_BYTES:
                return NO_SWEEP
            tokens = min(tokens, self.tile * max(1, SWEEP_BYTES // (self.tile * token)))
        return tokens

    def kernel(self, *, bounded_waits: bool = False) -> KernelInstance:
        """The instance to compile."""
        return instance(
            "tiered_attention",
            head_dim=self.head_dim,
            tile=self.tile,
            slots=self.slots,
            teams=self.teams,
            half=self.half,
            bounded_waits=bounded_waits,
        )


def refusal(problem: AttentionProblem) -> str | None:
    """Why the kernel does not take this problem; None where it does."""
    if problem.head_dim not in HEAD_DIMS:
        return f"heads of {problem.head_dim} elements; the kernel has {HEAD_DIMS}"
    if not 1 <= problem.queries <= MAXIMUM_QUERIES:
        return f"{problem.queries} queries; from 1 to {MAXIMUM_QUERIES} are possible"
    if not 1 <= problem.batch <= MAXIMUM_BATCH:
        return f"{problem.batch} sequences; from 1 to {MAXIMUM_BATCH} are possible"
    if problem.tokens < 1:
        return "the cache has no tokens"
    return None


def tile_of(head_dim: int) -> int:
    """Tokens of a tile: about 16 KiB of keys, and few enough for the registers of the sums."""
    if head_dim == 64:
        return 128
    return 32 if head_dim == 256 else 64


def choose(problem: AttentionProblem) -> AttentionConfiguration:
    """The configuration for a problem that is not refused."""
    teams = 2 if problem.rows <= WARPGROUP_ROWS else 1
    half = problem.dtype == torch.float16
    return AttentionConfiguration(problem.head_dim, tile_of(problem.head_dim), teams, half)


def configurations() -> Iterator[AttentionConfiguration]:
    """All that `choose` may return."""
    for head_dim in HEAD_DIMS:
        for teams in (2, 1):
            for half in (False, True):
                yield AttentionConfiguration(head_dim, tile_of(head_dim), teams, half)
