"""Tile shapes of the portable attention kernels, and how decode cuts the tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

DEFAULT_WINDOW = 512 * 1024
"""Remote bytes in flight where the record names no window, as for triton_linear."""
PARTIAL_BYTES = 64 * 2**20
"""Partial results of a decode call, at most, if longer runs of tokens can bring it about."""

_LEAST_CHUNK, _CHUNK = 128, 512  # tokens


@dataclass(frozen=True, slots=True)
class TileShape:
    """A tile of query rows over blocks of tokens; columns are padded to powers of two."""

    rows: int
    tokens: int
    head_columns: int
    value_columns: int
    warps: int
    stages: int

    def bytes_in_flight(self, itemsize: int) -> int:
        """Bytes of keys and values that a program has asked for and not yet received, at most."""
        ahead = max(self.stages - 1, 1)
        return ahead * self.tokens * (self.head_columns + self.value_columns) * itemsize


def tile_shape(rows: int, head_dim: int, value_dim: int, dtype: torch.dtype) -> TileShape:
    """For that many rows of a group; fits the shared memory of sm_80 (163 KB) and sm_86 (99 KB)."""
    head, value = _columns(head_dim), _columns(value_dim)
    wide = max(head, value) * dtype.itemsize  # bytes
    if dtype == torch.float32:  # products without tensor cores: large tiles spill registers
        m = max(16, 1 << max(rows - 1, 0).bit_length()) if rows <= 32 else 32
        return TileShape(m, 32 if wide <= 256 else 16, head, value, 8 if m == 32 else 4, 2)
    if rows <= 64:
        m = max(16, 1 << max(rows - 1, 0).bit_length())
        tokens = 64 if wide <= 256 else 32
        return TileShape(m, tokens, head, value, 8 if m == 64 else 4, 3 if wide <= 256 else 2)
    if wide <= 256:
        return TileShape(128, 64, head, value, 8, 3)
    return TileShape(64, 32, head, value, 8, 2)


def chunk_tokens(
    *, tokens: int, groups: int, rows: int, value_dim: int, programs: int, block: int
) -> int:
    """Tokens of one unit of a decode call; a multiple of `block`.

    Short enough that there are twice as many units as programs, down to 128, and long enough that
    partial results stay within PARTIAL_BYTES. `groups` are key heads of all sequences times tiles
    of rows, `rows` all query rows of all heads.
    """
    size = max(_CHUNK, block)
    while size > max(_LEAST_CHUNK, block) and math.ceil(tokens / size) * groups < 2 * programs:
        size //= 2
    while size < tokens and math.ceil(tokens / size) * rows * (value_dim + 1) * 4 > PARTIAL_BYTES:
        size *= 2
    return size


def precision(dtype: torch.dtype) -> str:
    """How products of fp32 operands are made; of no matter for the others."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


def _columns(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())
