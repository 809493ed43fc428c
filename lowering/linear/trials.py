"""Which way serves a kind of call: what was measured at the first one, else what is estimated.

Estimates of the kernel and the ring are off by 10 to 40% in prefill, and nothing predicts the stock
kernels, so where they leave a doubt the ways are timed on the call's own operands.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dak_inductor import options
from dak_inductor.lowering.choices import Choices, fastest
from dak_inductor.lowering.host_cost import way_seconds
from dak_inductor.lowering.linear.call_facts import CallFacts, kind_of
from dak_inductor.lowering.linear.ways import Way, WayName

log = logging.getLogger(__name__)

OVERLAP_SECONDS = 3e-6
"""What a launch of the kernel takes less among its like than in a trial, beyond what the other ways
do: it starts while the one before it ends, and lets the next one start. With this value what trials
choose loses least in the recorded grids, of products one after the other
(`benchmarks/check_trials.py`)."""
GRAPH_SECONDS = 1e-6
"""The same between kernels of a graph (`CallFacts.in_graph`), where trials are made among such:
what follows another way cannot start beside what is ahead of it, as no trial shows. With 0, 1 and 3
us a step of 8 layers of Llama-3-8B takes 1.189, 1.149 and 1.149 ms with one token and 0.5%
in host memory, and 1.595, 1.596 and 1.646 ms with 64 and 2%."""
SURE = 0.5
"""An estimate below this part of all others is believed."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One measurement: the call that it was made on, seconds of each way in the estimates' order,
    and the one taken for all calls of its kind."""

    call: CallFacts
    seconds: tuple[tuple[WayName, float], ...]
    chosen: WayName

    @classmethod
    def of(cls, call: CallFacts, ways: Sequence[Way], seconds: Sequence[float]) -> Trial:
        """The fastest of `ways` in a step is taken, or the first where that gains too little."""
        timed = tuple((way.name, each) for way, each in zip(ways, seconds, strict=True))
        overlap = GRAPH_SECONDS if call.in_graph else OVERLAP_SECONDS
        in_a_step = [each + (overlap if name != "direct" else 0.0) for name, each in timed]
        return cls(call, timed, ways[fastest(in_a_step)].name)

    @property
    def sparing(self) -> WayName:
        """The one taken where the host is slower than the GPU."""
        return min(self.seconds, key=lambda timed: with_host(timed[0], timed[1], self.call))[0]

    @property
    def taken(self) -> str:
        """For people."""
        if self.sparing == self.chosen:
            return self.chosen
        return f"{self.chosen}; {self.sparing} where the host is slower than the GPU"

    @property
    def times(self) -> str:
        return ", ".join(f"{name} {seconds * 1e6:.1f} us" for name, seconds in self.seconds)

    def __str__(self) -> str:
        return f"{self.call}: {self.times}; {self.chosen} is taken"


_STATES = itertools.count()


class Trials:
    """The choices so far. Thread-safe; one that is made stays.

    `state` is another number, also than of other trials, once calls may get other ways than before.
    """

    def __init__(self, *, capturing: Callable[[int], bool] | None = None) -> None:
        self._choices = Choices[CallFacts, WayName](capturing=capturing)
        self._results: dict[CallFacts, Trial] = {}  # by kind, in order
        self._enabled: bool | None = None
        self.state = next(_STATES)

    @property
    def enabled(self) -> bool:
        """Whether choices are measured; from the environment until `switch` is called."""
        if self._enabled is None:
            self._enabled = options.trials_by_default()
        return self._enabled

    def switch(self, on: bool) -> None:
        """Off, estimates alone choose, also where something was measured before."""
        if on != self._enabled:
            self.state = next(_STATES)
        self._enabled = on

    def is_settled(self, call: CallFacts, ways: Sequence[Way]) -> bool:
        """Whether later calls like this one get the same way, as long as `state` is the same."""
        if len(ways) == 1 or not self.enabled:
            return True
        return self._choices.of(kind_of(call)) is not None

    def results(self) -> tuple[Trial, ...]:
        """What was measured, in order."""
        return tuple(self._results.values())

    def result_of(self, call: CallFacts) -> Trial | None:
        """The measurement that chose for calls of this kind, if there was one."""
        return self._results.get(kind_of(call))

    def current(self, call: CallFacts, ways: Sequence[Way]) -> Way:
        """What `choose` would return without measuring."""
        chosen = self._choices.of(kind_of(call)) if self.enabled else None
        return next((way for way in ways if way.name == chosen), ways[0])

    def sparing(self, call: CallFacts, ways: Sequence[Way]) -> Way:
        """The one of `ways` that takes the least of GPU and host together, by a trial or the
        estimates."""
        trial = self.result_of(call) if self.enabled else None
        measured = {} if trial is None else dict(trial.seconds)

        def seconds(way: Way) -> float:
            known = measured.get(way.name, way.seconds)
            return math.inf if known is None else with_host(way.name, known, call)

        return min(ways, key=seconds)

    def choose(
        self, call: CallFacts, ways: Sequence[Way], measure: Callable[[], Sequence[float]]
    ) -> Way:
        """One of `ways`, of which the first is the estimates' choice.

        `measure` gives the seconds of each. It is called for the first call of a kind, unless a
        graph is being captured; that call's choice is not remembered. While it runs, calls of the
        same kind from other threads get the estimates' choice.
        """
        first = ways[0]
        if len(ways) == 1 or not self.enabled:
            return first

        def trial() -> WayName:
            made = Trial.of(call, ways, measure())
            self._results[kind_of(call)] = made
            log.info("%s", made)
            return made.chosen

        chosen = self._choices.make(
            kind_of(call),
            first.name,
            None if is_sure(ways) else trial,
            device_index=call.device_index,
        )
        return next((way for way in ways if way.name == chosen), first)


def with_host(way: WayName, seconds: float, call: CallFacts) -> float:
    """By what to choose where the host is slower than the GPU, of which a way takes so long: both
    together, since what a long product takes of the GPU may make that the slower one."""
    return seconds + way_seconds(way, call)


def is_sure(ways: Sequence[Way]) -> bool:
    """Whether the first way's estimate is so far below the others that nothing is measured."""
    first = ways[0].seconds
    if first is None:
        return False
    return all(way.seconds is not None and first < SURE * way.seconds for way in ways[1:])


TRIALS = Trials()
"""Those of this process."""


def results() -> tuple[Trial, ...]:
    """What this process has measured, in order."""
    return TRIALS.results()
