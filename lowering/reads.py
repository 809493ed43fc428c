"""Which bytes of a tiered operand an operator touches."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

import dak_inductor.lowering.residency  # noqa: F401  (registers torch.ops.dak.residency)
from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.current_stream import current_capture
from dak_inductor.cuda_runtime.read_count import load_counter, queue_count
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.lowering import counters
from dak_inductor.lowering.refusals import HOPPER, capability

_of_thread = threading.local()


@contextmanager
def uncounted() -> Iterator[None]:
    """Nothing that this thread queues inside has its reads counted in a record, but by our kernels
    themselves."""
    before = getattr(_of_thread, "uncounted", False)
    _of_thread.uncounted = True
    try:
        yield
    finally:
        _of_thread.uncounted = before


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


def token_read(
    buffer: TieredBuffer, operand: torch.Tensor, spans: Sequence[tuple[int, int]]
) -> TierBytes:
    """Bytes by tier when some tokens of keys or values [B, H, S, D] are read once each.

    `spans` holds for each sequence the first token and the one past the last. Any memory order will
    do whose elements along D are adjacent; heads or sequences that are one memory (stride 0) count
    once; of another order, all is read.
    """
    if operand.stride(3) != 1 or operand.stride(2) <= 0:
        return dense_read(buffer, operand)
    size = operand.element_size()
    width = operand.shape[3] * size
    step = operand.stride(2) * size
    heads = operand.shape[1] if operand.stride(1) else min(operand.shape[1], 1)
    base = operand.data_ptr() - buffer.address
    count = TierBytes()
    for sequence, (first, last) in enumerate(spans):
        first, last = max(first, 0), min(last, operand.shape[2])
        if last <= first or (sequence and not operand.stride(0)):
            continue
        for head in range(heads):
            start = base + (sequence * operand.stride(0) + head * operand.stride(1)) * size
            # Tokens [0, whole) lie before the split with their last byte; one may lie across it.
            whole = min(max((buffer.split - start - width) // step + 1, first), last)
            local = (whole - first) * width
            if whole < last:
                local += min(max(buffer.split - start - whole * step, 0), width)
            count = count + TierBytes(local, (last - first) * width - local)
    return count


def count_tokens(
    kind: str, operands: Sequence[torch.Tensor], spans: Sequence[tuple[int, int]]
) -> None:
    """Count a read of some tokens of those operands that are tiered, those of one buffer as one
    call. On the host."""
    found: dict[int, tuple[TieredBuffer, TierBytes]] = {}
    for operand in operands:
        buffer = address_table.lookup(operand.data_ptr())
        if buffer is not None:
            before = found.get(id(buffer), (buffer, TierBytes()))[1]
            found[id(buffer)] = (buffer, before + token_read(buffer, operand, spans))
    for buffer, count in found.values():
        counters.record(kind, buffer.label, count)


def count_dense(kind: str, *operands: torch.Tensor) -> None:
    """Count a full read of those operands that are tiered, those of one buffer as one call.

    Called by the CPU implementations, and on CUDA where no kernel that counts took the call: the
    counts then go to the buffer's record.
    """
    for buffer, operand, spans in dense_spans(operands):
        count_spans(kind, buffer, operand, spans)


def dense_spans(
    operands: Sequence[torch.Tensor],
) -> list[tuple[TieredBuffer, torch.Tensor, tuple[tuple[int, int], ...]]]:
    """By buffer that holds some of the operands: the first of them, and (start, size) in bytes of
    each."""
    found: dict[int, tuple[TieredBuffer, list[torch.Tensor]]] = {}
    for operand in operands:
        buffer = address_table.lookup(operand.data_ptr())
        if buffer is not None:
            found.setdefault(id(buffer), (buffer, []))[1].append(operand)
    return [
        (
            buffer,
            held[0],
            tuple([(each.data_ptr() - buffer.address, extent(each)) for each in held]),
        )
        for buffer, held in found.values()
    ]


def count_spans(
    kind: str,
    buffer: TieredBuffer,
    operand: torch.Tensor,
    spans: Sequence[tuple[int, int]],
    read: TierBytes | None = None,
) -> None:
    """Count one call that reads these (start, size) bytes of `buffer`.

    Args:
        operand: any view of it.
        read: the same by tier as it is split now, where that is known.
    """
    if buffer.record is None:
        counters.record(kind, buffer.label, read or bytes_of(buffer, spans))
        return
    if getattr(_of_thread, "uncounted", False):
        return
    capture = current_capture(operand.device)
    if not capture:
        _ready_for_captures(operand.device)
        buffer.record.count_call(read or bytes_of(buffer, spans))
    elif capability(operand.device.index) >= HOPPER:
        index = operand.device.index
        queue_count(buffer.record.address, spans, capture=capture, device_index=index)
    else:
        words: torch.Tensor = torch.ops.dak.residency.default(operand)
        add_reads(words, spans)


def bytes_of(buffer: TieredBuffer, spans: Sequence[tuple[int, int]]) -> TierBytes:
    """(start, size) bytes of a buffer by tier."""
    return sum((buffer.bytes_in(start, start + size) for start, size in spans), TierBytes())


def _ready_for_captures(device: torch.device) -> None:
    """A model is called before it is captured."""
    if device.type == "cuda" and capability(device.index) >= HOPPER:
        load_counter(device.index)


def add_reads(words: torch.Tensor, reads: Sequence[tuple[int, int]]) -> None:
    """Count a captured call by torch's own kernels, on any GPU.

    `words` is the record (`dak_inductor.cuda_runtime.device_records`) as int64. Each replay counts
    by the split of that moment. Not atomic, so two streams that read one weight through stock
    kernels at once may lose a call.
    """
    split, local, remote, calls = (words[index : index + 1] for index in range(4))
    for start, size in reads:
        in_local = (split - start).clamp_(0, size)
        local.add_(in_local)
        remote.sub_(in_local).add_(size)
    calls.add_(1)


def count_rows(kind: str, table: torch.Tensor, rows: torch.Tensor) -> None:
    """Count a read of some rows of `table` if it is tiered."""
    buffer = address_table.lookup(table.data_ptr())
    if buffer is not None:
        counters.record(kind, buffer.label, row_read(buffer, table, rows))
