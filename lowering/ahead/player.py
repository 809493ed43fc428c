"""Queues what a step's plan says: copies on a queue of their own, products on the main one.

All copies are in one order on one queue, and the last part that is read waits for the last copy, so
a step that was played to its end leaves nothing that is not joined. Memory of the ring is taken and
given back on the main queue, as of any temporary: what used it before is ordered before the first
copy, what uses it next comes after the last read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dak_inductor.lowering import reads
from dak_inductor.lowering.ahead.ring_places import Place
from dak_inductor.lowering.ahead.sequence import StepCall
from dak_inductor.lowering.ahead.step_plan import OpStep, StepPlan
from dak_inductor.lowering.ahead.timeline import LOCAL, Part
from dak_inductor.lowering.linear import ring, ring_plan
from dak_inductor.lowering.linear.copy_engine import copy_bytes
from dak_inductor.lowering.linear.product import Product
from dak_inductor.lowering.linear.queues import Queues
from dak_inductor.lowering.marks import MARKS

_FIRST = 2
"""Copies queued before the step's first kernel: the host takes 5 to 10 us for each."""
_MORE = 4
"""Copies queued at most with each product besides its own; few products have more than one."""


class Player:
    """One played step. `calls` are those that the plan was made for.

    Raises torch.OutOfMemoryError where there is no memory for the ring.
    """

    def __init__(
        self, plan: StepPlan, calls: Sequence[StepCall], queues: Queues, device: torch.device
    ) -> None:
        self._plan, self._calls, self._queues, self._device = plan, calls, queues, device
        self._memory: Tensor | None = None
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
        self._memory = None

    def pass_by(self) -> None:
        """A product that reads the link itself is about to be queued."""
        self._fetch(_MORE)

    @torch.no_grad()
    def run(self, op: OpStep, product: Product) -> Tensor:
        """A staged product. Rounds where the stock composition does; each byte counts as read once.

        Raises DriverError where a copy cannot be queued.
        """
        with MARKS.of_buffers("staged", product.buffers):
            return self._run(op, product)

    def _run(self, op: OpStep, product: Product) -> Tensor:
        rows = ring.token_rows(product.x)
        n = product.weights[0].shape[0]
        outputs = tuple(rows.new_empty((rows.shape[0], n)) for _ in product.weights)
        products = ring.Products(rows, product.weights, product.biases, outputs, (), False)
        main = self._queues.main
        main.run(partial(reads.count_dense, "linear", *ring.counted(product.weights)))
        for number in op.order:
            if number == LOCAL:
                main.run(partial(self._in_place, op, products))
                self._fetch(_MORE)
            else:
                self._part(number, products)
        self._fetch(_MORE)
        self._joined = len(self._read) == len(self._plan.parts)
        main.run(partial(ring.finish, outputs, product.activation, product.residual))
        return outputs[0].view(*product.x.shape[:-1], n)

    def _take(self) -> None:
        self._memory = torch.empty(self._plan.ring_bytes, dtype=torch.uint8, device=self._device)

    def _fetch(self, more: int) -> None:
        """Queue up to so many of the next copies whose place is free behind what was queued."""
        for _ in range(more):
            number = len(self._copied)
            if self._joined or number == len(self._plan.parts):
                return
            after = self._plan.at[number].after
            if after >= len(self._read):
                return
            if after > self._waited:
                self._waited = after
                self._queues.copies.wait(self._read[after])
            self._queues.copies.run(partial(self._copy, number))
            self._copied.append(self._queues.copies.record())

    def _copy(self, number: int) -> None:
        part, place = self._plan.parts[number], self._plan.at[number]
        if part.copied and self._memory is not None:
            weight = self._calls[part.op].weights[part.weight]
            begins = (part.remote - part.start) * part.row_bytes
            buffer = None if weight.buffer is None else weight.buffer()
            with MARKS.of_buffers("copy", (buffer,)):
                copy_bytes(
                    self._memory.data_ptr() + place.offset + begins,
                    weight.address + part.remote * part.row_bytes,
                    part.copied,
                    self._device,
                )

    def _in_place(self, op: OpStep, products: ring.Products) -> None:
        """The rows of each weight ahead of its first part."""
        first = {}
        for number in reversed(op.order):
            if number != LOCAL:
                part = self._plan.parts[number]
                first[part.weight] = part.start
        for weight, matrix in enumerate(products.weights):
            stop = first.get(weight, matrix.shape[0])
            if stop:
                products.compute(ring_plan.Part(weight, 0, stop, False), None)

    def _part(self, number: int, products: ring.Products) -> None:
        self._fetch(number + 1 - len(self._copied))
        self._queues.main.wait(self._copied[number])
        self._queues.main.run(
            partial(self._multiply, self._plan.parts[number], self._plan.at[number], products)
        )
        self._read.append(self._queues.main.record())

    def _multiply(self, part: Part, place: Place, products: ring.Products) -> None:
        assert self._memory is not None
        rows = part.stop - part.start
        weight = products.weights[part.weight]
        slot = self._memory[place.offset : place.offset + part.size].view(weight.dtype)
        if part.remote > part.start:
            held = slot.view(rows, weight.shape[1])[: part.remote - part.start]
            _copy_by_kernel(held, weight[part.start : part.remote])
        products.compute(ring_plan.Part(part.weight, part.start, part.stop, True), slot)


def _copy_by_kernel(target: Tensor, source: Tensor) -> None:
    """Copy a few rows, bit by bit.

    Not by copy engine, as torch's own copy of contiguous memory is: on the main queue it would wait
    there for the link's copies, and 48 of them took a step of 6.4 ms of link time to 8.8 (H200,
    `decode_step.json`; the cause was inferred, not isolated).
    """
    bits = target.view(torch.int16)
    torch.bitwise_or(source.view(torch.int16), 0, out=bits)
