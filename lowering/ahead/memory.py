"""What is known of the steps of one compiled graph with one set of weights.

Kept by token counts, so that prefill and decode of one dynamic graph do not forget each other. A
step is learned at its first call, planned at the next one and whenever a split has moved, and
learned again after it did not follow its order.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.errors import ProfileError
from dak_inductor.lowering.ahead.plan_choice import choose
from dak_inductor.lowering.ahead.player import Player
from dak_inductor.lowering.ahead.prediction import predicted_seconds
from dak_inductor.lowering.ahead.prepared_plan import PreparedPlan
from dak_inductor.lowering.ahead.sequence import CallSequence, SplitOf, Splits
from dak_inductor.lowering.ahead.step import (
    LearningStep,
    PlayedStep,
    place_of,
)
from dak_inductor.lowering.ahead.step_costs import link_rates, step_ops, tier_of
from dak_inductor.lowering.ahead.step_plan import StepPlans
from dak_inductor.lowering.linear.launch import profile_of
from dak_inductor.lowering.linear.open_step import (
    OutsideStep,
    current,
    enter,
    spare_host,
    spares_host,
)
from dak_inductor.lowering.linear.queues import queues_of
from dak_inductor.options import Strategy

log = logging.getLogger(__name__)

OwnStep = LearningStep | PlayedStep

MOST_STEPS = 8
"""Token counts remembered of one graph; the one called longest ago goes first."""
MOST_DERAILMENTS = 3
"""Then a step is not staged any more: each was copied ahead in vain, in part."""


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes of device memory that a ring may take; `charged`: weights make room for them."""

    nbytes: int
    charged: bool = False


@dataclass(slots=True)
class KnownStep:
    """One step. `splits` are those that `plans` were made for; `prepared` is what playing them
    takes, by whether in a capture; `off` says why nothing is staged any more."""

    sequence: CallSequence | None = None
    splits: Splits | None = None
    plans: StepPlans | None = None
    prepared: dict[bool, PreparedPlan] = field(default_factory=dict)
    derailments: int = 0
    off: str = ""

    def forget(self) -> None:
        """Learn it anew."""
        self.sequence = None
        self.replace(None, None)

    def replace(self, plans: StepPlans | None, splits: Splits | None) -> None:
        """Other plans from here on."""
        self.plans, self.splits = plans, splits
        self.prepared.clear()

    def playable(self, sequence: CallSequence, *, captured: bool) -> PreparedPlan | None:
        """What the next call plays; None where it runs as without a step."""
        if self.plans is None or not self.plans.of(captured=captured).staged:
            return None
        if captured not in self.prepared:
            plan = self.plans.of(captured=captured)
            self.prepared[captured] = PreparedPlan(plan, sequence.calls)
        return self.prepared[captured]


class StepMemory:
    """All steps of one graph with one set of weights. Used under the launch lock.

    Args:
        name: for the log.
        room: asked before a step is planned, never during a capture.
    """

    def __init__(self, name: str, strategy: Strategy, room: Callable[[], Room]) -> None:
        self.name, self.strategy = name, strategy
        self.ring_bytes = 0  # of the largest ring that a step had, or may have in a capture
        self._grew = False
        self._held: torch.Tensor | None = None
        self._ask_room = room
        self._room: Room | None = None
        self.least_room: int | None = None
        """Bytes that a ring could have whenever a step was planned. It only falls, so that what is
        placed by it does not move back and forth."""
        self._steps: OrderedDict[Hashable, KnownStep] = OrderedDict()

    def ring_grew(self) -> bool:
        """Whether a step had, or may have in a capture, a larger ring than all before, since this
        was last asked."""
        grew, self._grew = self._grew, False
        return grew

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
        room = self._room or self._ask_room()
        return predicted_seconds(
            known.sequence,
            split_of,
            strategy=self.strategy,
            room=max(room.nbytes, self.ring_bytes),
            charged=room.charged,
            device_index=device_index,
        )

    @contextmanager
    def opened(
        self,
        tokens: Hashable,
        device: torch.device,
        written: Callable[[], Collection[TieredBuffer]] = tuple,
    ) -> Iterator[None]:
        """Around one call of the graph, on the current stream of `device`.

        `written` gives the buffers to which the graph itself writes, for a step that is learned.

        Inside the step of another graph nothing is staged, and that step does not see the products.
        """
        known, step, spared = None, None, spares_host()
        if (outer := current()) is not None:
            before = enter(OutsideStep(measures=outer.measures))
        else:
            if self.strategy != "direct":
                known = self._known(tokens)
                step = self._begin(tokens, known, device, written)
            before = enter(step)
            planned = None if known is None else known.plans
            spare_host(planned is not None and planned.eager.spares_host)
        failed = True
        try:
            yield
            failed = False
        finally:
            spare_host(spared)
            enter(before)
            if known is not None:
                self._held = None
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
    ) -> OwnStep | None:
        if known.off:
            return None
        capturing = place_of(device)[1] != 0
        splits = None if known.sequence is None else known.sequence.splits()
        if known.sequence is None or splits is None:
            known.forget()
            return None if capturing else LearningStep(device, written())
        if known.plans is None or known.splits != splits:
            try:
                plans = self._plan(tokens, known.sequence, device.index, capturing)
            except ProfileError as error:
                self._switch_off(tokens, known, str(error))
                return None
            known.replace(plans, splits)
            if plans is not None and not capturing:
                self._ready_for_captures(plans, device)
        prepared = known.playable(known.sequence, captured=capturing)
        if prepared is None:
            return None
        try:
            player = Player(prepared, queues_of(device), device)
        except torch.OutOfMemoryError:
            self._switch_off(tokens, known, "there was no memory for the ring")
            return None
        try:
            return PlayedStep(known.sequence, splits, prepared.plan, player, device)
        except BaseException:
            player.close()
            raise

    def _ready_for_captures(self, plans: StepPlans, device: torch.device) -> None:
        """Make what their plan needs and this call's own may not: cuBLAS's handle of the thread,
        which no capture can make, and the room of the ring."""
        if device.type == "cuda" and plans.captured.staged:
            with torch.cuda.device(device):
                torch.cuda.current_blas_handle()
        if not plans.eager.ring_bytes:
            self._hold(plans.captured.ring_bytes, device)

    def _hold(self, ring_bytes: int, device: torch.device) -> None:
        """Take the ring that captures will have through this call, which has none of its own:
        weights make room for the peak that torch's allocator reports of calls outside of them."""
        if ring_bytes > self.ring_bytes:
            try:
                self._held = torch.empty(ring_bytes, dtype=torch.uint8, device=device)
            except torch.OutOfMemoryError:
                return
            self._note_ring(ring_bytes)

    def _note_ring(self, ring_bytes: int) -> None:
        self._grew |= ring_bytes > self.ring_bytes
        self.ring_bytes = max(self.ring_bytes, ring_bytes)

    def _plan(
        self, tokens: Hashable, sequence: CallSequence, index: int, capturing: bool
    ) -> StepPlans | None:
        """None where they cannot be made now. Both are made at once: calls outside of a capture
        come before it, and room is asked for there."""
        if not capturing:
            self._room = self._ask_room()
        if self._room is None:
            return None
        calls = sequence.calls
        tier, profile = tier_of(calls), profile_of(index)
        ops = step_ops(calls, tier, index)
        spared = step_ops(calls, tier, index, spared=True)
        if ops is None or spared is None:
            return None
        room = max(self._room.nbytes, self.ring_bytes)
        self.least_room = room if self.least_room is None else min(room, self.least_room)
        plans = choose(
            ops,
            link_rates(profile, profile.link(tier)),
            strategy=self.strategy,
            room=room,
            charged=self._room.charged,
            spared=spared,
        )
        plan, eager = plans.captured, plans.eager
        log.info(
            "%s, %s: %d of %d products staged ahead through %.1f MB; predicted %.3f ms, all direct "
            "%.3f ms; outside of CUDA graphs %d staged, %.3f ms, all direct %.3f ms",
            self.name, tokens_text(tokens), plan.staged, len(ops), plan.ring_bytes / 1e6,
            plan.seconds * 1e3, plan.direct_seconds * 1e3,
            eager.staged, eager.seconds * 1e3, eager.direct_seconds * 1e3,
        )  # fmt: skip
        return plans

    def _end(self, tokens: Hashable, known: KnownStep, step: OwnStep, failed: bool) -> None:
        if step.elsewhere:
            reason = "its products run on another stream, or are captured by the compiler"
            self._switch_off(tokens, known, reason)
        elif isinstance(step, LearningStep):
            known.sequence = step.sequence
        elif failed:
            known.forget()
        elif step.derailed:
            known.forget()
            known.derailments += 1
            log.info("%s, %s: not as learned: %s", self.name, tokens_text(tokens), step.derailed)
            if known.derailments >= MOST_DERAILMENTS:
                self._switch_off(tokens, known, f"its products vary: {step.derailed}")
        elif not step.captured:
            self._note_ring(step.plan.ring_bytes)

    def _switch_off(self, tokens: Hashable, known: KnownStep, reason: str) -> None:
        known.forget()
        known.off = reason
        log.info("%s, %s: nothing is staged ahead: %s", self.name, tokens_text(tokens), reason)


def tokens_text(tokens: Hashable) -> str:
    """For people: "1 tokens"; "any tokens" of a graph that knows none."""
    if isinstance(tokens, tuple):
        return f"{', '.join(map(str, tokens)) or 'any'} tokens"
    return f"{tokens} tokens"
