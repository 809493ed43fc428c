"""What is known of one step: the order of its products, and the plans by which it is played."""

from __future__ import annotations

from dataclasses import dataclass, field

from dak_inductor.lowering.ahead.prepared_plan import PreparedPlan
from dak_inductor.lowering.ahead.sequence import CallSequence, Splits
from dak_inductor.lowering.ahead.step_plan import StepPlans


@dataclass(slots=True)
class KnownStep:
    """One step. `inside`: Inductor calls its products in a place of its own. `splits` are those
    that `plans` were made for; `prepared` is what playing them takes, by whether in a capture;
    `off` says why nothing is staged any more."""

    sequence: CallSequence | None = None
    inside: bool = False
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
