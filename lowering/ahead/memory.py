"""What is known of the steps of one compiled graph with one set of weights.

Kept by token counts, so that prefill and decode of one dynamic graph do not forget each other. A
step is learned at its first call, planned at the next one and whenever a split has moved, and
learned again after it did not follow its order.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.errors import ProfileError
from dak_inductor.lowering.ahead.known_step import KnownStep
from dak_inductor.lowering.ahead.place import Place, place_of
from dak_inductor.lowering.ahead.planning import plans_of, predicted_seconds
from dak_inductor.lowering.ahead.player import Player
from dak_inductor.lowering.ahead.ring_room import RingRoom, Room
from dak_inductor.lowering.ahead.sequence import CallSequence, SplitOf, Splits
from dak_inductor.lowering.ahead.step import ELSEWHERE, InsideStep, LearningStep, PlayedStep
from dak_inductor.lowering.ahead.step_plan import StepPlans
from dak_inductor.lowering.linear.open_step import (
    OutsideStep,
    current,
    enter,
    enter_graph,
    spare_host,
    spares_host,
)
from dak_inductor.lowering.linear.product import Product
from dak_inductor.lowering.queues import queues_of
from dak_inductor.options import Strategy

log = logging.getLogger(__name__)

OwnStep = LearningStep | PlayedStep | InsideStep
Between = Callable[[], Mapping[int, Sequence[float]]]

MOST_STEPS = 8
"""Token counts remembered of one graph; the one called longest ago goes first."""
MOST_DERAILMENTS = 3
"""Then a step is not staged any more: each was copied ahead in vain, in part."""


class StepMemory:
    """All steps of one graph with one set of weights. Used under the launch lock.

    Args:
        name: for the log.
        room: asked before a step is planned, never during a capture.
    """

    def __init__(self, name: str, strategy: Strategy, room: Callable[[], Room]) -> None:
        self.name, self.strategy = name, strategy
        self.ring = RingRoom(room)
        self.in_graphs = False
        """Whether a CUDA graph that Inductor captured has copies ahead: it keeps their parts."""
        self._steps: OrderedDict[Hashable, KnownStep] = OrderedDict()

    @property
    def never(self) -> bool:
        """Whether nothing is ever copied ahead: by the option, or since all steps are off."""
        known = self._steps.values()
        return self.strategy == "direct" or (bool(known) and all(step.off for step in known))

    def steps(self) -> Iterator[tuple[Hashable, KnownStep]]:
        """Those with plans or a reason to have none, by token counts."""
        for tokens, known in self._steps.items():
            if known.plans is not None or known.off:
                yield tokens, known

    def predicted(self, split_of: SplitOf, device_index: int) -> float | None:
        """Seconds of the step called last, were its buffers split so; None where that is not known.
        Never asked during a capture."""
        known = next(reversed(self._steps.values()), None)
        if known is None or known.off or known.sequence is None:
            return None
        return predicted_seconds(
            known.sequence,
            self.ring.to_predict(),
            strategy=self.strategy,
            device_index=device_index,
            split_of=split_of,
        )

    @contextmanager
    def opened(
        self,
        tokens: Hashable,
        device: torch.device,
        written: Callable[[], Collection[TieredBuffer]] = tuple,
        between: Between = dict,
    ) -> Iterator[None]:
        """Around one call of the graph, on the current stream of `device`.

        `written` gives the buffers to which the graph itself writes, for a step that is learned,
        and `between` the seconds of what lies between its products (`CallSequence.with_work`), for
        one of few tokens that is planned for the first time. With many tokens that is attention
        most of all, whose time the masks of a graph do not tell.

        Inside the step of another graph nothing is staged, and that step does not see the products.
        """
        known, step, spared = None, None, spares_host()
        if (outer := current()) is not None:
            before = enter(OutsideStep(measures=outer.measures))
        else:
            if self.strategy != "direct":
                known = self._known(tokens)
                step = self._begin(tokens, known, device, written, between)
            before = enter(step)
            planned = None if known is None else known.plans
            spare_host(planned is not None and planned.eager.spares_host)
        inside = enter_graph(True)
        failed = True
        try:
            yield
            failed = False
        finally:
            spare_host(spared)
            enter_graph(inside)
            enter(before)
            if known is not None:
                self.ring.release()
            if step is not None and known is not None:
                step.close(failed=failed)
                self._end(tokens, known, step, failed)

    def _known(self, tokens: Hashable) -> KnownStep:
        known = self._steps.setdefault(tokens, KnownStep())
        self._steps.move_to_end(tokens)
        if len(self._steps) > MOST_STEPS:
            self._steps.popitem(last=False)
        return known

    def _begin(
        self,
        tokens: Hashable,
        known: KnownStep,
        device: torch.device,
        written: Callable[[], Collection[TieredBuffer]],
        between: Between,
    ) -> OwnStep | None:
        if known.off:
            return None
        capturing = place_of(device).capture != 0
        splits = None if known.sequence is None else known.sequence.splits()
        if known.sequence is None or splits is None:
            known.forget()
            return None if capturing else LearningStep(device, written())
        if known.plans is None and known.sequence.of_few_tokens:
            known.sequence = known.sequence.with_work(between())
        # of what Inductor captured a replay has the parts of the capture, wherever bytes lie now
        planned = known.plans is not None and known.inside
        if not planned and not self._plan_anew(tokens, known, splits, device, capturing):
            return None
        if known.inside:
            return InsideStep(device, partial(self._begin_inside, tokens, known, device, written))
        return self._play(tokens, known, known.sequence, splits, device)

    def _begin_inside(
        self,
        tokens: Hashable,
        known: KnownStep,
        device: torch.device,
        written: Callable[[], Collection[TieredBuffer]],
        first: Product,
        opened: Place,
    ) -> PlayedStep | LearningStep | None:
        """At the first product. Sizes with as many tokens may be other ones: Inductor warms up and
        captures each. Those that are warmed up are learned, others captured as without a step."""
        sequence = known.sequence
        assert sequence is not None
        capturing = place_of(device).capture != 0
        if sequence.calls[0].key != first.key:
            if capturing:
                return None
            known.forget()
            return LearningStep(device, written(), opened=opened)
        splits = sequence.splits()
        if splits is None or not self._plan_anew(tokens, known, splits, device, capturing):
            return None
        return self._play(tokens, known, sequence, splits, device)

    def _play(
        self,
        tokens: Hashable,
        known: KnownStep,
        sequence: CallSequence,
        splits: Splits,
        device: torch.device,
    ) -> PlayedStep | None:
        """A step that begins here; None where the plan for here stages nothing."""
        prepared = known.playable(sequence, captured=place_of(device).capture != 0)
        if prepared is None:
            return None
        try:
            player = Player(prepared, queues_of(device, ahead=True), device)
        except torch.OutOfMemoryError:
            self._switch_off(tokens, known, "there was no memory for the ring")
            return None
        try:
            return PlayedStep(sequence, splits, prepared.plan, player, device, inside=known.inside)
        except BaseException:
            player.close()
            raise

    def _plan_anew(
        self,
        tokens: Hashable,
        known: KnownStep,
        splits: Splits,
        device: torch.device,
        capturing: bool,
    ) -> bool:
        """If its plans are not of these splits. False where the step is given up."""
        assert known.sequence is not None
        if known.plans is None or known.splits != splits:
            try:
                plans = self._plan(tokens, known.sequence, device.index, capturing)
            except ProfileError as error:
                self._switch_off(tokens, known, str(error))
                return False
            known.replace(plans, splits)
            if plans is not None and not capturing:
                self._ready_for_captures(plans, device, in_this_call=known.inside)
        return True

    def _ready_for_captures(
        self, plans: StepPlans, device: torch.device, *, in_this_call: bool
    ) -> None:
        """Make what their plan needs and this call's own may not: cuBLAS's handle of the thread,
        which no capture can make, and the room of the ring, unless this call captures."""
        if device.type == "cuda" and plans.captured.staged:
            with torch.cuda.device(device):
                torch.cuda.current_blas_handle()
        if not plans.eager.ring_bytes and not in_this_call:
            self.ring.hold(plans.captured.ring_bytes, device)

    def _plan(
        self, tokens: Hashable, sequence: CallSequence, index: int, capturing: bool
    ) -> StepPlans | None:
        """None where they cannot be made now. Both are made at once: calls outside of a capture
        come before it, and room is asked for there."""
        room = self.ring.to_plan(capturing=capturing)
        if room is None:
            return None
        plans = plans_of(sequence, room, strategy=self.strategy, device_index=index)
        if plans is None:
            return None
        plan, eager = plans.captured, plans.eager
        log.info(
            "%s, %s: %d of %d products staged ahead through %.1f MB; predicted %.3f ms, all direct "
            "%.3f ms; outside of CUDA graphs %d staged, %.3f ms, all direct %.3f ms",
            self.name, tokens_text(tokens), plan.staged, len(plan.ops), plan.ring_bytes / 1e6,
            plan.seconds * 1e3, plan.direct_seconds * 1e3,
            eager.staged, eager.seconds * 1e3, eager.direct_seconds * 1e3,
        )  # fmt: skip
        return plans

    def _end(self, tokens: Hashable, known: KnownStep, step: OwnStep, failed: bool) -> None:
        if isinstance(step, InsideStep):
            if step.begun is None:
                return
            step = step.begun
        if isinstance(step, PlayedStep) and known.inside:
            self.in_graphs |= step.captured  # also of one that did not follow its order
        if step.elsewhere:
            self._switch_off(tokens, known, ELSEWHERE)
        elif isinstance(step, LearningStep):
            known.sequence, known.inside = step.sequence, step.inside
        elif failed:
            known.forget()
        elif step.derailed:
            known.forget()
            known.derailments += 1
            log.info("%s, %s: not as learned: %s", self.name, tokens_text(tokens), step.derailed)
            if known.derailments >= MOST_DERAILMENTS:
                self._switch_off(tokens, known, f"its products vary: {step.derailed}")
        elif known.inside or not step.captured:
            self.ring.note(step.plan.ring_bytes)

    def _switch_off(self, tokens: Hashable, known: KnownStep, reason: str) -> None:
        known.forget()
        known.off = reason
        log.info("%s, %s: nothing is staged ahead: %s", self.name, tokens_text(tokens), reason)


def tokens_text(tokens: Hashable) -> str:
    """For people: "1 token", "5, 300 tokens"; "any tokens" of a graph that knows none."""
    found = tokens if isinstance(tokens, tuple) else (tokens,)
    return f"{', '.join(map(str, found)) or 'any'} {'token' if found == (1,) else 'tokens'}"
