"""One call of a compiled graph: its products are noted down, or served by a plan.

A step belongs to the thread that opened it, and to the stream and the capture that were current
there. A product that is called anywhere else is none of it: Inductor runs and captures parts of a
graph on streams of its own.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from dak_inductor.cuda_runtime.current_stream import current_capture, current_stream
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.lowering.ahead.player import Player
from dak_inductor.lowering.ahead.sequence import (
    CallSequence,
    Splits,
    StepCall,
    call_of,
)
from dak_inductor.lowering.ahead.step_plan import StepPlan
from dak_inductor.lowering.linear.product import Product


def place_of(device: torch.device) -> tuple[int, int]:
    """The current stream of `device` and the capture that is open on it, 0 for none."""
    stream = current_stream(device.index) if device.type == "cuda" else 0
    return stream, current_capture(device)


class LearningStep:
    """Notes down the calls of a step that runs as without it.

    Nothing of the buffers `written` is ever staged: a copy could be ahead of the graph's own write.
    """

    measures = True

    def __init__(self, device: torch.device, written: Collection[TieredBuffer] = ()) -> None:
        self._written = written
        self._device, self._place = device, place_of(device)
        self._calls: list[StepCall] = []
        self.elsewhere = False
        self.sequence: CallSequence | None = None

    def serve(self, product: Product) -> Tensor | None:
        """None."""
        if product.x.device != self._device:
            return None
        if place_of(self._device) != self._place:
            self.elsewhere = True
        elif not self.elsewhere:
            self._calls.append(call_of(product, self._written))
        return None

    def close(self, *, failed: bool) -> None:
        """`sequence` is what was learned; None where there is nothing to learn."""
        if self._calls and not failed and not self.elsewhere:
            self.sequence = CallSequence(tuple(self._calls))


class PlayedStep:
    """Serves calls by a plan, as long as they come in its order.

    `derailed` says why one did not; that one and all after it run as without the step. A product
    that can be staged can be as long as its key is the same: it holds all that `ring.refusal` asks.
    """

    measures = False

    def __init__(
        self,
        sequence: CallSequence,
        splits: Splits,
        plan: StepPlan,
        player: Player,
        device: torch.device,
    ) -> None:
        self._sequence, self._splits, self.plan = sequence, splits, plan
        self._player, self._device, self._place = player, device, place_of(device)
        self._next = 0
        self.elsewhere = False
        self.captured = self._place[1] != 0
        self.derailed = ""
        player.begin()

    def serve(self, product: Product) -> Tensor | None:
        """By the plan; None for a product that stays direct, or once the step is derailed."""
        if self.derailed or product.x.device != self._device:
            return None
        if place_of(self._device) != self._place:
            # Nothing may be queued here: a capture must not wait for what was queued before it.
            self.elsewhere = True
            self.derailed = "its products run on another stream, or are captured by the compiler"
            return None
        reason = self._mismatch(product)
        if reason:
            self._derail(reason)
            return None
        number = self._next
        self._next += 1
        if self.plan.ops[number].strategy == "direct":
            self._player.pass_by()
            return None
        return self._player.run(number, product)

    def _mismatch(self, product: Product) -> str:
        if self._next == len(self._sequence.calls):
            return "it has more products than it had"
        call = self._sequence.calls[self._next]
        if product.key != call.key:
            return f"product {self._next} is another than it was"
        # The launch lock is held, but by this thread: a graph that is called inside of this one
        # may plan again and move pages while copies are under way.
        if call.splits() != self._splits[self._next]:
            return "a split was moved meanwhile"
        return ""

    def _derail(self, reason: str) -> None:
        """Join the copies; nothing more is served."""
        self.derailed = reason
        self._player.join()

    def close(self, *, failed: bool) -> None:
        """The call of the graph has ended; everything is joined."""
        if not self.derailed and (failed or self._next < len(self._sequence.calls)):
            self.derailed = "it ended early"
        self._player.close()
