"""Queues what a step's plan says: copies on a queue of their own, products on the main one.

All copies are in one order on one queue, and the last part that is read waits for the last copy, so
a step that was played to its end leaves nothing that is not joined. Memory of the ring is taken and
given back on the main queue, as of any temporary: what used it before is ordered before the first
copy, what uses it next comes after the last read.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from dak_inductor.lowering.ahead.prepared_plan import Copy, PreparedPlan, Rows
from dak_inductor.lowering.ahead.timeline import LOCAL
from dak_inductor.lowering.element_types import ELEMENT_BYTES
from dak_inductor.lowering.linear import ring
from dak_inductor.lowering.linear.copy_engine import copy_bytes
from dak_inductor.lowering.linear.counted_reads import count
from dak_inductor.lowering.linear.epilogue import finish
from dak_inductor.lowering.linear.launch import CopiedRows
from dak_inductor.lowering.linear.product import Product
from dak_inductor.lowering.marks import MARKS
from dak_inductor.lowering.queues import Queue, Queues

_FIRST = 2
"""Copies queued before the step's first kernel: the host takes 5 to 10 us for each."""
_MORE = 4
"""Copies queued at most with each product besides its own; few products have more than one."""


class Player:
    """One played step.

    Raises torch.OutOfMemoryError where there is no memory for the ring.
    """

    def __init__(self, prepared: PreparedPlan, queues: Queues, device: torch.device) -> None:
        self._prepared, self._queues, self._device = prepared, queues, device
        self._memory: Tensor | None = None
        self._elements: Tensor | None = None  # the same, as elements of the last product's type
        self._copied: list[Any] = []
        self._read: list[Any] = []
        self._waited = -1  # the last part whose place the copies waited for
        self._joined = True
        queues.main.run(self._take)

    def begin(self) -> None:
        """Queue the first copies."""
        self._joined = False
        self._queues.copies.wait(self._queues.main.record())
        self._fetch(_FIRST)

    def join(self) -> None:
        """The main queue goes on behind all copies; nothing more is copied."""
        if not self._joined:
            self._joined = True
            self._queues.main.wait(self._queues.copies.record())

    def close(self) -> None:
        """Give the ring back."""
        self.join()
        self._memory = self._elements = None

    def pass_by(self) -> None:
        """A product that reads the link itself is about to be queued."""
        self._fetch(_MORE)

    def run(self, number: int, product: Product) -> Tensor:
        """A staged product. Rounds where the stock composition does; each byte counts as read once.

        Raises DriverError where a copy cannot be queued.
        """
        serve = self._in_one if self._prepared.plan.ops[number].launched else self._in_parts
        with MARKS.ready(self._prepared.names[number]):
            if not torch.is_grad_enabled():
                return serve(number, product)
            with torch.no_grad():
                return serve(number, product)

    def _in_one(self, number: int, product: Product) -> Tensor:
        """By one launch of the kernel behind all copies for it; it counts what it reads."""
        main, prepared = self._queues.main, self._prepared
        parts = tuple([rows for (rows,) in prepared.orders[number]])
        last = parts[-1].part
        self._fetch(last + 1 - len(self._copied))
        main.wait(self._copied[last])
        x, n = product.x, product.weights[0].shape[0]
        out = x.new_empty((x.numel() // x.shape[-1], n))
        main.run(partial(self._launch, number, product, parts, out))
        for rows in parts:
            self._has_read(rows.part)
        self._fetch(_MORE)
        return out if x.dim() == 2 else out.view(*x.shape[:-1], n)

    def _launch(self, number: int, product: Product, parts: tuple[Rows, ...], out: Tensor) -> None:
        copied: list[CopiedRows | None] = [None] * len(product.weights)
        for rows in parts:
            copied[rows.weight] = CopiedRows(rows.start, self._rows(rows, product))
        product.launch_into(out, *self._prepared.launch(number, product), copied)

    def _in_parts(self, number: int, product: Product) -> Tensor:
        """By stock operators, part by part."""
        x = ring.token_rows(product.x)
        n = product.weights[0].shape[0]
        outputs = tuple([x.new_empty((x.shape[0], n)) for _ in product.weights])
        main, prepared = self._queues.main, self._prepared
        main.run(partial(count, prepared.counted(number, product), product.weights))
        for rows in prepared.orders[number]:
            part = rows[0].part
            if part == LOCAL:
                main.run(partial(_in_place, rows, x, product, outputs))
                self._fetch(_MORE)
                continue
            self._fetch(part + 1 - len(self._copied))
            main.wait(self._copied[part])
            main.run(partial(self._in_ring, rows[0], x, product, outputs))
            self._has_read(part)
        self._fetch(_MORE)
        main.run(partial(finish, outputs, product.activation, product.residual))
        return outputs[0] if product.x.dim() == 2 else outputs[0].view(*product.x.shape[:-1], n)

    def _has_read(self, part: int) -> None:
        prepared = self._prepared
        awaited = part in prepared.awaited
        self._read.append(_mark(self._queues.main, prepared.read, part) if awaited else None)
        self._joined = len(self._read) == len(prepared.copies)

    def _take(self) -> None:
        ring_bytes = self._prepared.plan.ring_bytes
        self._memory = torch.empty(ring_bytes, dtype=torch.uint8, device=self._device)
        self._elements = None

    def _fetch(self, more: int) -> None:
        """Queue up to so many of the next copies whose place is free behind what was queued."""
        if self._joined:
            return
        copies, prepared = self._queues.copies, self._prepared
        number = len(self._copied)
        for copy in prepared.copies[number : number + max(more, 0)]:
            after = copy.after
            if after >= len(self._read):
                return
            if after > self._waited:
                self._waited = after
                copies.wait(self._read[after])
            copies.launch(partial(self._copy, copy))
            self._copied.append(_mark(copies, prepared.copied, number))
            number += 1

    def _copy(self, copy: Copy, stream: int) -> None:
        if copy.nbytes and self._memory is not None:
            with MARKS.ready(copy.mark):
                target = self._memory.data_ptr() + copy.target
                copy_bytes(target, copy.source, copy.nbytes, self._device, stream)

    def _in_ring(
        self, rows: Rows, x: Tensor, product: Product, outputs: tuple[Tensor, ...]
    ) -> None:
        _multiply(rows, x, self._rows(rows, product).t(), product, outputs)

    def _rows(self, rows: Rows, product: Product) -> Tensor:
        """They, [rows, K], in the ring, those few that no copy brings among them."""
        weight = product.weights[rows.weight]
        if self._elements is None or self._elements.dtype != weight.dtype:
            assert self._memory is not None
            whole = self._memory.numel() // ELEMENT_BYTES * ELEMENT_BYTES
            self._elements = self._memory[:whole].view(weight.dtype)
        elements, k = self._elements, weight.shape[1]
        if rows.few:
            held = elements.as_strided((rows.few, k), (k, 1), rows.at)
            _copy_by_kernel(held, weight[rows.start : rows.start + rows.few])
        return elements.as_strided((rows.stop - rows.start, k), (k, 1), rows.at)


def _mark(queue: Queue, marks: list[Any], part: int) -> Any:
    """Behind all work so far; the one that an earlier play set for this part, set anew."""
    mark = marks[part] = queue.record(marks[part])
    return mark


def _in_place(
    rows: tuple[Rows, ...], x: Tensor, product: Product, outputs: tuple[Tensor, ...]
) -> None:
    """The rows of each weight ahead of its first part."""
    for each in rows:
        weight = product.weights[each.weight]
        shape, stride = (weight.shape[1], each.stop), (1, weight.stride(0))
        factor = weight.as_strided(shape, stride, weight.storage_offset())
        _multiply(each, x, factor, product, outputs)


def _multiply(
    rows: Rows, x: Tensor, factor: Tensor, product: Product, outputs: tuple[Tensor, ...]
) -> None:
    """Into columns of a matrix with contiguous rows, which cuBLAS writes directly.

    Each view is one call of torch: as two, a slice and its transpose, it takes the host 3 us more.
    """
    out, bias = outputs[rows.weight], product.biases[rows.weight]
    tokens, n = out.shape
    if rows.stop - rows.start != n:
        out = out.as_strided((tokens, rows.stop - rows.start), (n, 1), rows.start)
    if bias is None:
        torch.mm(x, factor, out=out)
    else:
        torch.addmm(bias[rows.start : rows.stop], x, factor, out=out)


def _copy_by_kernel(target: Tensor, source: Tensor) -> None:
    """Copy a few rows, bit by bit.

    Not by copy engine, as torch's own copy of contiguous memory is: on the main queue it would wait
    there for the link's copies, and 48 of them took a step of 6.4 ms of link time to 8.8 (H200,
    `decode_step.json`; the cause was inferred, not isolated).
    """
    bits = target.view(torch.int16)
    torch.bitwise_or(source.view(torch.int16), 0, out=bits)
