"""How keys or values [B, H, S, D] lie in memory, where their local part ends, copies of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.lowering import reads
from dak_inductor.lowering.linear.copy_engine import copy


@dataclass(frozen=True, slots=True)
class StoredTokens:
    """A tensor [B, H, S, D] as segments that each hold all tokens of one or more heads.

    Attributes:
        tensor: [B, H, S, D].
        buffer: that holds it; None: it is all local.
        segments: runs of tokens: one where tokens are the outermost dimension of memory
            ("token-major": [S, B, H, D]), one for each head and sequence in [B, H, S, D].
        pitch: elements from a segment to the next.
        width: elements of a token in one segment.
    """

    tensor: Tensor
    buffer: TieredBuffer | None
    segments: int
    pitch: int
    width: int

    @property
    def tokens(self) -> int:
        return self.tensor.shape[2]

    @property
    def elements(self) -> int:
        """Of one token, all heads and sequences."""
        return self.segments * self.width

    def local_tokens(self) -> int:
        """Tokens [0, this) are wholly local; of several segments it is all of them, or none."""
        if self.buffer is None:
            return self.tokens
        local = self._local_bytes()
        if self.segments == 1:
            token_bytes = self.width * self.tensor.element_size()
            return min(max(local // token_bytes, 0), self.tokens)
        return self.tokens if local >= reads.extent(self.tensor) else 0

    def held(self, slot: Tensor, tokens: int) -> Tensor:
        """The first part of a flat slot as [B, H, tokens, D], segments as in memory."""
        batch, heads, _, width = self.tensor.shape
        flat = slot[: tokens * self.elements]
        if self.segments == 1:
            return flat.view(tokens, batch, heads, width).permute(1, 2, 0, 3)
        return flat.view(batch, heads, tokens, width)

    def copy(self, slot: Tensor, start: int, stop: int, stream: int) -> None:
        """Queue copies of tokens [start, stop) to a flat slot, by copy engine, on that CUstream.

        The driver takes a copy for what its first byte is, so local and remote bytes do not mix.
        """
        columns = (stop - start) * self.width
        source = self.tensor.as_strided(
            (self.segments, columns),
            (self.pitch, 1),
            self.tensor.storage_offset() + start * self.width,
        )
        target = slot[: self.segments * columns].view(self.segments, columns)
        local = self.segments * columns
        if self.buffer is not None:
            size = self.tensor.element_size()
            local = (self._local_bytes() // size) - start * self.width
        for rows, across in rectangles(self.segments, self.pitch, columns, local):
            copy(target[rows, across], source[rows, across], stream)

    def spans(self, first: int, stop: int) -> list[tuple[int, int]]:
        """Where tokens [first, stop) lie in the buffer: byte of the start and bytes, by segment."""
        assert self.buffer is not None
        size = self.tensor.element_size()
        start = self.tensor.data_ptr() - self.buffer.address + first * self.width * size
        nbytes, pitch = (stop - first) * self.width * size, self.pitch * size
        if nbytes == pitch:
            return [(start, nbytes * self.segments)]
        return [(start + segment * pitch, nbytes) for segment in range(self.segments)]

    def _local_bytes(self) -> int:
        assert self.buffer is not None
        return self.buffer.split - (self.tensor.data_ptr() - self.buffer.address)


def count_reads(stored: tuple[StoredTokens, ...], first: int, stop: int) -> None:
    """Count one read of tokens [first, stop) of each. Those of one buffer are one call."""
    found: dict[int, list[StoredTokens]] = {}
    for each in stored:
        if each.buffer is not None:
            found.setdefault(id(each.buffer), []).append(each)
    for together in found.values():
        buffer, tensor = together[0].buffer, together[0].tensor
        assert buffer is not None
        spans = [span for each in together for span in each.spans(first, stop)]
        reads.count_spans("attention", buffer, tensor, spans)


def stored_tokens(tensor: Tensor, buffer: TieredBuffer | None) -> StoredTokens | None:
    """How [B, H, S, D] lies in memory; None where it is neither token-major nor has segments."""
    batch, heads, tokens, width = tensor.shape
    if width > 1 and tensor.stride(3) != 1:
        return None
    row = batch * heads * width
    dense = all(
        size == 1 or stride == wanted
        for size, stride, wanted in zip(
            (heads, batch, tokens),
            (tensor.stride(1), tensor.stride(0), tensor.stride(2)),
            (width, heads * width, row),
            strict=True,
        )
    )
    if dense:
        return StoredTokens(tensor, buffer, 1, tokens * row, row)
    pitch = tensor.stride(1) if heads > 1 else tensor.stride(0)
    merged = batch == 1 or heads == 1 or tensor.stride(0) == heads * pitch
    if merged and pitch >= tokens * width and (tokens == 1 or tensor.stride(2) == width):
        return StoredTokens(tensor, buffer, batch * heads, pitch, width)
    return None


def rectangles(rows: int, pitch: int, columns: int, local: int) -> list[tuple[slice, slice]]:
    """Parts of a matrix that are wholly local or wholly remote, as rows and columns.

    Elements before `local` are local, counted from the first one, in rows `pitch` apart.
    """
    whole = min(max(math.floor((local - columns) / pitch) + 1, 0), rows)  # rows all local
    cut = min(max(local - whole * pitch, 0), columns) if whole < rows else 0
    every = slice(0, columns)
    found = [(slice(0, whole), every)] if whole else []
    if cut:
        found += [(slice(whole, whole + 1), slice(0, cut))]
        if cut < columns:
            found += [(slice(whole, whole + 1), slice(cut, columns))]
        whole += 1
    if whole < rows:
        found += [(slice(whole, rows), every)]
    return found
