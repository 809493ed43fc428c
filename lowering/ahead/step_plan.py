"""The plan of one step: which products are staged, where their parts go, and the predicted time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dak_inductor.lowering.ahead.ring_places import Place
from dak_inductor.lowering.ahead.timeline import Part


@dataclass(frozen=True, slots=True)
class OpStep:
    """How one product runs, and why.

    order: parts and `timeline.LOCAL`; () for a direct one.
    launched: one launch of the kernel reads all parts in the ring and the other rows in place.
    """

    strategy: Literal["direct", "staged"]
    reason: str
    order: tuple[int, ...] = ()
    launched: bool = False


@dataclass(frozen=True, slots=True)
class StepPlan:
    """`parts` are copied and read in their order, part i through `at[i]`.

    Attributes:
        ring_bytes: 0 where nothing is staged.
        seconds: predicted of the products as planned and, in decode for CUDA graphs, of what lies
            between them; `direct_seconds` with none staged.
        work: `seconds` without what products wait for.
        host_seconds: what of `seconds` the host is busy; 0 in a CUDA graph.
        spares_host: products without copies ahead are served in the way that spares the host.
    """

    ops: tuple[OpStep, ...]
    parts: tuple[Part, ...]
    at: tuple[Place, ...]
    ring_bytes: int
    seconds: float
    direct_seconds: float
    work: float
    host_seconds: float = 0.0
    spares_host: bool = False

    @property
    def staged(self) -> int:
        """How many products are."""
        return sum(op.strategy == "staged" for op in self.ops)

    @property
    def waits_for_host(self) -> bool:
        """Whether the GPU is predicted to end before the host has queued all."""
        return 0.0 < self.seconds <= self.host_seconds


@dataclass(frozen=True, slots=True)
class StepPlans:
    """Of one step: `captured` for CUDA graphs, whose replays take what the GPU takes; `eager`
    outside of them, where a step takes no less than the host does to queue it."""

    captured: StepPlan
    eager: StepPlan

    def of(self, *, captured: bool) -> StepPlan:
        return self.captured if captured else self.eager
