"""The grid of `bench_linear`: weight shapes, token counts, remote fractions, and its shards."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

DECODE_TOKENS = (1, 2, 3, 8, 16, 17, 32, 64, 128)
PREFILL_TOKENS = (256, 512, 1024, 2048, 4096, 8192)
FRACTIONS = (0.0, 0.005, 0.01, 0.02, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A weight [n, k] in the [out, in] layout."""

    n: int
    k: int

    def weight_bytes(self, dtype: torch.dtype) -> int:
        return self.n * self.k * dtype.itemsize

    def __str__(self) -> str:
        return f"{self.n}x{self.k}"


SHAPES = tuple(
    LinearShape(n, k)
    for n, k in (
        (28672, 8192), (8192, 28672), (28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096),
        (128256, 4096), (5120, 27648), (1000, 4104), (7168, 2048),
    )
)  # fmt: skip
TINY_SHAPES = (LinearShape(264, 72), LinearShape(64, 128))
"""For machines without a GPU."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One shape at one remote fraction: the token counts share its weights."""

    shape: LinearShape
    fraction: float


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `index` of `count` of a grid, from 1."""

    index: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def units(
    shapes: Sequence[LinearShape], fractions: Sequence[float], shard: Shard = Shard()
) -> list[Unit]:
    """The units of a shard, whole shapes together as far as the shards allow.

    Each shard is a contiguous part of the grid, so that few shapes are measured in two shards, each
    with its own C.
    """
    every = [Unit(shape, fraction) for shape in shapes for fraction in fractions]
    first = len(every) * (shard.index - 1) // shard.count
    last = len(every) * shard.index // shard.count
    return every[first:last]


def parse_shapes(text: str) -> tuple[LinearShape, ...]:
    """'28672x8192,4096x4096' as weights [n, k]."""
    made = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*([1-9]\d*)x([1-9]\d*)\s*", part)
        if found is None:
            raise argparse.ArgumentTypeError(f"{part!r} is no shape such as 28672x8192")
        made.append(LinearShape(int(found[1]), int(found[2])))
    return tuple(made)


def parse_tokens(text: str) -> tuple[int, ...]:
    """'1,16', or the names 'decode' and 'prefill' among them."""
    names = {"decode": DECODE_TOKENS, "prefill": PREFILL_TOKENS}
    made: list[int] = []
    for part in (part.strip() for part in text.split(",")):
        if part not in names and not re.fullmatch(r"[1-9]\d*", part):
            raise argparse.ArgumentTypeError(f"{part!r} is neither a token count nor {list(names)}")
        made += names[part] if part in names else (int(part),)
    return tuple(sorted(set(made)))


def parse_shard(text: str) -> Shard:
    """'2/4': the second of four parts."""
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if found is None or int(found[1]) > int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no shard such as 2/4")
    return Shard(int(found[1]), int(found[2]))
