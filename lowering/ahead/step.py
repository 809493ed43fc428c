"""One call of a compiled graph: its products are noted down, or served by a plan.

A step belongs to the thread that opened it, and to one place: a stream and the capture that is open
on it. That is where it is opened, or, where Inductor runs and captures the graph on a stream of its
own, where the first of its products is called. A product that is called anywhere else is none of
it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.lowering.ahead.place import Place, compiler_graph, place_of
from dak_inductor.lowering.ahead.player import Player
from dak_inductor.lowering.ahead.sequence import (
    CallSequence,
    Splits,
    StepCall,
    call_of,
)
from dak_inductor.lowering.ahead.step_plan import StepPlan
from dak_inductor.lowering.linear.product import Product

ELSEWHERE = "its products run on several streams or in several CUDA graphs"


class LearningStep:
    """Notes down the calls of a step that runs as without it.

    Nothing of the buffers `written` is ever staged: a copy could be ahead of the graph's own write.
    The step was `opened` here, or there.

    Attributes:
        elsewhere: its products were not all called in one place.
        inside: they were, and that is none where the step was opened.
        sequence: what was learned; None until it is closed, or where there is nothing to learn.
    """

    measures = True

    def __init__(
        self,
        device: torch.device,
        written: Collection[TieredBuffer] = (),
        *,
        opened: Place | None = None,
    ) -> None:
        self._written = written
        self._device, self._opened = device, opened or place_of(device)
        self._place: object = None
        self._calls: list[StepCall] = []
        self.elsewhere = self.inside = False
        self.sequence: CallSequence | None = None

    def serve(self, product: Product) -> Tensor | None:
        """None."""
        if product.x.device != self._device:
            return None
        here = place_of(self._device)
        place = here, compiler_graph(self._device)
        if self._place is None:
            self._place, self.inside = place, here != self._opened
        if place != self._place:
            self.elsewhere = True
        elif not self.elsewhere:
            self._calls.append(call_of(product, self._written))
        return None

    def close(self, *, failed: bool) -> None:
        """The call of the graph has ended."""
        if self._calls and not failed and not self.elsewhere:
            self.sequence = CallSequence(tuple(self._calls))


class PlayedStep:
    """Serves calls by a plan, as long as they come in its order.

    `derailed` says why one did not; that one and all after it run as without the step. A product
    that can be staged can be as long as its key is the same: it holds all that `ring.refusal` asks.

    Begins where it is made. With `inside` it ends behind the last of its products, or the first out
    of order: a capture that is Inductor's own ends before the step is closed.
    """

    measures = False

    def __init__(
        self,
        sequence: CallSequence,
        splits: Splits,
        plan: StepPlan,
        player: Player,
        device: torch.device,
        *,
        inside: bool = False,
    ) -> None:
        self._sequence, self._splits, self.plan = sequence, splits, plan
        self._player, self._device, self._place = player, device, place_of(device)
        self._next, self._inside = 0, inside
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
            self.derailed = ELSEWHERE
            return None
        reason = self._mismatch(product)
        if reason:
            self._derail(reason)
            return None
        try:
            return self._play(product)
        except BaseException:
            if self._inside:  # its capture ends before the step is closed
                self._player.close()
            raise

    def _play(self, product: Product) -> Tensor | None:
        number = self._next
        self._next += 1
        served = None
        if self.plan.ops[number].strategy == "direct":
            self._player.pass_by()
        else:
            served = self._player.run(number, product)
        if self._inside and self._next == len(self._sequence.calls):
            self._player.close()
        return served

    def _mismatch(self, product: Product) -> str:
        if self._next == len(self._sequence.calls):
            return "it has more products than it had"
        call = self._sequence.calls[self._next]
        if product.key != call.key:
            return f"product {self._next} is another than it was"
        # The launch lock is held, but by this thread: a graph that is called inside of this one
        # may plan again and move pages while copies are under way.
        staged = self.plan.ops[self._next].strategy == "staged"
        if staged and call.splits() != self._splits[self._next]:
            return "a split was moved meanwhile"
        return ""

    def _derail(self, reason: str) -> None:
        """Join the copies; nothing more is served."""
        self.derailed = reason
        if self._inside:
            self._player.close()
        else:
            self._player.join()

    def close(self, *, failed: bool) -> None:
        """The call of the graph has ended; everything is joined."""
        if not self.derailed and (failed or self._next < len(self._sequence.calls)):
            self.derailed = "it ended early"
        self._player.close()


class InsideStep:
    """A step whose products Inductor calls in a place of its own: `begin` makes it of the first
    and the place where the graph was called.

    A replay of Inductor's calls none of them; `begun` is None then.
    """

    def __init__(
        self,
        device: torch.device,
        begin: Callable[[Product, Place], PlayedStep | LearningStep | None],
    ) -> None:
        self._device, self._begin, self._opened = device, begin, place_of(device)
        self._waits = True
        self.begun: PlayedStep | LearningStep | None = None

    @property
    def measures(self) -> bool:
        """Whether it is learned."""
        return self.begun is not None and self.begun.measures

    def serve(self, product: Product) -> Tensor | None:
        """As the step that has begun; None where none has."""
        if self._waits and product.x.device == self._device:
            self._waits, self.begun = False, self._begin(product, self._opened)
        return None if self.begun is None else self.begun.serve(product)

    def close(self, *, failed: bool) -> None:
        """The call of the graph has ended."""
        if self.begun is not None:
            self.begun.close(failed=failed)
