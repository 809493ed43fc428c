"""The grid of `bench_attention`: caches by batch, context and heads, and remote fractions."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dak_inductor.benchmarks.harness.linear_grid import Shard

MOST_DECODE_QUERIES = 16
PREFILL_FRACTIONS = (0.0, 0.1, 0.5, 1.0)
FRACTIONS = (0.0, 0.005, 0.01, 0.02, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One step over keys and values [batch, kv_heads, tokens, head_dim], all tokens valid.

    Each head of keys serves `ratio` query heads, `queries` new tokens of each sequence: few of a
    decode step, or those of a prefill, which may be all.
    """

    batch: int
    tokens: int
    kv_heads: int
    ratio: int
    head_dim: int = 128
    queries: int = 1

    def cache_bytes(self, dtype: torch.dtype) -> int:
        """Of keys and values together."""
        return 2 * self.batch * self.tokens * self.kv_heads * self.head_dim * dtype.itemsize

    @property
    def is_prefill(self) -> bool:
        return self.queries > MOST_DECODE_QUERIES

    @property
    def flops(self) -> float:
        """Of both products; a query sees the tokens up to its own."""
        pairs = self.queries * (self.tokens - self.queries) + self.queries * (self.queries + 1) // 2
        return 4.0 * self.batch * self.kv_heads * self.ratio * pairs * self.head_dim

    def __str__(self) -> str:
        text = f"{self.batch}x{self.tokens}x{self.kv_heads}x{self.ratio}x{self.head_dim}"
        return text if self.queries == 1 else f"{text}x{self.queries}"


def _of(heads: tuple[int, int], places: Sequence[tuple[int, int]]) -> list[AttentionShape]:
    return [AttentionShape(batch, tokens, *heads) for batch, tokens in places]


SHAPES = (
    # 8 heads of keys for 32: 4 KiB a token
    *_of((8, 4), ((1, 16384), (1, 131072), (8, 2048), (8, 32768), (32, 1024), (32, 8192),
                  (128, 1024))),
    # whole prompts, and a chunk behind a long context
    *(AttentionShape(1, tokens, 8, 4, queries=tokens) for tokens in (2048, 8192, 32768)),
    *(AttentionShape(4, tokens, 8, 8, queries=tokens) for tokens in (2048, 8192)),
    AttentionShape(1, 8192, 32, 1, queries=8192),
    AttentionShape(1, 32768, 8, 4, queries=2048),
    # other head sizes, and several queries
    *(AttentionShape(8, 16384, 8, 4, head_dim) for head_dim in (64, 80, 96, 192, 256)),
    AttentionShape(8, 16384, 8, 4, queries=4),
    AttentionShape(8, 16384, 8, 8, queries=16),
    # 32 heads, each its own: 16 KiB a token
    *_of((32, 1), ((1, 4096), (1, 131072), (16, 4096), (128, 1024))),
    # 4 heads for 28: 2 KiB a token
    *_of((4, 7), ((1, 32768), (1, 131072), (32, 8192), (128, 1024))),
    # 8 heads for 64
    *_of((8, 8), ((1, 32768), (1, 131072), (32, 8192), (128, 1024))),
    # the largest last: a time limit cuts these
    *_of((8, 4), ((128, 8192), (64, 131072))),
)  # fmt: skip
QUICK_SHAPES = (
    *_of((8, 4), ((1, 16384), (8, 32768), (128, 1024))),
    *_of((32, 1), ((1, 4096), (16, 4096))),
    *_of((8, 8), ((32, 8192),)),
    AttentionShape(4, 2048, 8, 4, queries=2048),
    AttentionShape(1, 8192, 8, 4, queries=8192),
)
WHOLE_GRID = Shard()
TINY_SHAPES = (
    AttentionShape(2, 40, 2, 4, 64),
    AttentionShape(1, 33, 2, 1, 80, 3),
    AttentionShape(1, 40, 2, 2, 64, 40),
)
"""For machines without a GPU."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One shape at one remote fraction."""

    shape: AttentionShape
    fraction: float


def units(
    shapes: Sequence[AttentionShape], fractions: Sequence[float], shard: Shard = WHOLE_GRID
) -> list[Unit]:
    """The units of a shard, a contiguous part of the grid: few shapes are measured in two.

    A prefill is measured at a few fractions only, where the grid has these.
    """
    few = set(PREFILL_FRACTIONS) if set(PREFILL_FRACTIONS) <= set(fractions) else set(fractions)
    every = [
        Unit(shape, fraction)
        for shape in shapes
        for fraction in fractions
        if not shape.is_prefill or fraction in few
    ]
    first = len(every) * (shard.index - 1) // shard.count
    last = len(every) * shard.index // shard.count
    return every[first:last]


def parse_shapes(text: str) -> tuple[AttentionShape, ...]:
    """'8x32768x8x4x128': batch, tokens, heads of keys, ratio, head size, and queries if not 1."""
    made = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*[1-9]\d*(x[1-9]\d*){4,5}\s*", part)
        if found is None:
            raise argparse.ArgumentTypeError(f"{part!r} is no shape such as 8x32768x8x4x128")
        made.append(AttentionShape(*(int(number) for number in part.split("x"))))
    return tuple(made)
