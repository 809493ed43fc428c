"""Carries parts into a ring beside the products that read them, in a form graphs can record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from dak_inductor.benchmarks.harness.ring_load import RingLoad


class RingFiller(Protocol):
    """Fills the ring of `load` beside the current stream, from `begin` on, once for each call of
    it. Products ask for the parts in order."""

    load: RingLoad

    @property
    def name(self) -> str: ...

    def begin(self) -> None:
        """Start where the current stream is now."""

    def arrived(self, part: int) -> None:
        """Work on the current stream from here on finds the part in its place."""

    def read(self, part: int) -> None:
        """Work on the current stream so far is all that reads the part."""

    def join(self) -> None:
        """Work on the current stream from here on comes behind all that `begin` started."""

    def given_up(self) -> str:
        """Why what arrived so far may be wrong; "" where nothing is. Waits for the device."""


def carried(
    filler: RingFiller,
    consume: Callable[[int], object],
    before: Callable[[int], object] | None = None,
) -> Callable[[], None]:
    """A step that reads each part by `consume`, after what `before` does without the part."""

    def step() -> None:
        filler.begin()
        for part in range(len(filler.load)):
            if before is not None:
                before(part)
            filler.arrived(part)
            consume(part)
            filler.read(part)
        filler.join()

    return step


def free_running(filler: RingFiller) -> Callable[[], None]:
    """A step that fills the ring round and round for nobody; its load is `unread`."""

    def step() -> None:
        filler.begin()
        filler.join()

    return step
