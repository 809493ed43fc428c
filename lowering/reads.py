"""Which bytes of a tiered operand an operator touches."""

from __future__ import annotations

import torch

from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.tier_buffer import TierBytes, TieredBuffer
from dak_inductor.lowering import counters


def extent(tensor: torch.Tensor) -> int:
    """Bytes from the first to past the last element of a strided tensor; 0 when it is empty."""
    if tensor.numel() == 0:
        return 0
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return (last + 1) * tensor.element_size()


def dense_read(buffer: TieredBuffer, operand: torch.Tensor) -> TierBytes:
    """Bytes by tier when every element of `operand`, a view of `buffer`, is read once."""
    start = operand.data_ptr() - buffer.address
    return buffer.bytes_in(start, start + extent(operand))


def row_read(buffer: TieredBuffer, table: torch.Tensor, rows: torch.Tensor) -> TierBytes:
    """Bytes by tier when the distinct `rows` of `table` (leading dimension) are read once each."""
    start = table.data_ptr() - buffer.address
    step = table.stride(0) * table.element_size()
    width = extent(table[0]) if table.shape[0] else 0
    count = TierBytes(0, 0)
    for row in torch.unique(rows).tolist():
        first = start + (row % table.shape[0]) * step
        count = count + buffer.bytes_in(first, first + width)
    return count


def count_dense(kind: str, *operands: torch.Tensor) -> None:
    """Count a full read of those operands that are tiered. Called by the CPU implementations."""
    for operand in operands:
        buffer = address_table.lookup(operand.data_ptr())
        if buffer is not None:
            counters.record(kind, buffer.label, dense_read(buffer, operand))


def count_rows(kind: str, table: torch.Tensor, rows: torch.Tensor) -> None:
    """Count a read of some rows of `table` if it is tiered."""
    buffer = address_table.lookup(table.data_ptr())
    if buffer is not None:
        counters.record(kind, buffer.label, row_read(buffer, table, rows))
