"""What a product reads of tiered buffers where no kernel of ours counts it, worked out once."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import Tensor

from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.lowering import reads


@dataclass(frozen=True, slots=True)
class CountedRead:
    """Spans of (start, size) in bytes of a buffer, in which the product's weight of that number
    lies; in that `generation` of it they are these bytes by tier."""

    buffer: weakref.ref[TieredBuffer]
    weight: int
    spans: tuple[tuple[int, int], ...]
    generation: int
    read: TierBytes


def counted_reads(weights: tuple[Tensor, ...]) -> tuple[CountedRead, ...]:
    """Of a product that reads each of its weights once."""
    apart = _apart(weights)
    numbers = {weight.data_ptr(): number for number, weight in enumerate(weights)}
    return tuple(
        CountedRead(
            weakref.ref(buffer),
            numbers[first.data_ptr()],
            spans,
            buffer.generation,
            reads.bytes_of(buffer, spans),
        )
        for buffer, first, spans in reads.dense_spans(apart)
    )


def count(counted: tuple[CountedRead, ...], weights: tuple[Tensor, ...]) -> None:
    """Count them as one call for each buffer."""
    for each in counted:
        buffer = each.buffer()
        if buffer is not None:
            read = each.read if buffer.generation == each.generation else None
            reads.count_spans("linear", buffer, weights[each.weight], each.spans, read)


def _apart(weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The weights; two column ranges of one matrix as one, since their extents overlap."""
    first = min(weights, key=Tensor.data_ptr)
    last = max(weights, key=Tensor.data_ptr)
    apart = (last.data_ptr() - first.data_ptr()) // first.element_size()
    rows, columns = first.shape
    if not 0 < apart < first.stride(0) or first.stride() != last.stride() or rows == 1:
        return weights
    return (first.as_strided((rows, apart + columns), first.stride()),)
