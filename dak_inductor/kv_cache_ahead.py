"""Host pages of a KV cache made before the context needs them, so that a step only maps them.

A page of host memory takes 0.6 ms to pin and clear, and all layers reach the end of theirs in the
same step. Pages of GPU memory take 10 us, and are made when they are needed.

Pages are made, not mapped: zeros lie at their addresses, which work in flight may read through a
mask, and zeros cannot be unmapped under it.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterator, Sequence

from dak_inductor.cuda_runtime.memory_lock import MEMORY_LOCK
from dak_inductor.cuda_runtime.page_maker import PAGE_MAKER, Progress
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.errors import DakError
from dak_inductor.kv_cache_layer_storage import LayerStorage

log = logging.getLogger(__name__)

LEAD_TOKENS = 256
"""Pages are made once the context is this close to the end of its memory: 2 s of fast decoding."""
_LEAST_BOUND = 512 << 20
_BOUND_SHARE = 32
"""A buffer grows by a 32nd of it at most, so that this bound has room for one step of each."""
_STEPS = (1, 2, 4, 8)


class PagesAhead:
    """The next host pages of one cache's buffers.

    Attributes:
        bound: the most bytes made and not used, a 32nd of the cache or 512 MiB.
    """

    def __init__(self, tier: Tier, layers: Sequence[LayerStorage]) -> None:
        self._tier = tier
        self._layers = tuple(layers)
        buffers = [buffer for layer in layers for buffer in layer.buffers]
        self.bound = max(_LEAST_BOUND, sum(b.nbytes for b in buffers) // _BOUND_SHARE)
        self._due: deque[tuple[TieredBuffer, int]] = deque()  # and what is to be committed of it
        self._asked = False
        self._kept = False
        self._failure: Exception | None = None

    def watch(self, length: int) -> int | None:
        """Ask for pages if a context of `length` tokens is close to the end of its memory.

        Returns the length beyond which to call again; None where nothing more will grow.
        """
        ends = [layer.ready for layer in self._growing()]
        if not ends or not self._tier.makes_ahead:
            return None
        if min(ends) - length >= LEAD_TOKENS:
            return min(ends) - LEAD_TOKENS
        self._asked = True
        PAGE_MAKER.ask(self)
        return min(ends)

    def make_one(self) -> Progress:
        """Make one allocation, where it fits. Called by the page maker's thread."""
        with MEMORY_LOCK:
            try:
                # What begins while a page is made is not disturbed: see DeviceScope in driver.h.
                return Progress.WAITING if self._tier.capture_is_open() else self._make_next()
            except Exception as error:  # met again or raised by `check`, at the step concerned
                log.debug("pages ahead: %s", error)
                self._due.clear()
                self._failure = None if isinstance(error, DakError | MemoryError) else error
                return Progress.DONE

    def check(self) -> None:
        """Raise what went wrong in the background and is no matter of memory or the driver."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def give_back(self) -> bool:
        """Make no more, and give back what was made; whether there was any."""
        with MEMORY_LOCK:
            if self._kept:
                return False
            self._asked = False
            self._due.clear()
            held = [b for layer in self._layers for b in layer.buffers if b.ahead_bytes()]
            for buffer in held:
                buffer.drop_ahead()
            return bool(held)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Within this, shortage of memory takes the pages of others only. Under the memory lock."""
        self._kept = True
        try:
            yield
        finally:
            self._kept = False

    def held_bytes(self) -> int:
        """Bytes made and not used."""
        return sum(b.ahead_bytes() for layer in self._layers for b in layer.buffers)

    def _make_next(self) -> Progress:
        if self._asked:
            self._asked = False
            self._due = deque(self._next_commit())
        while self._due:
            buffer, committed = self._due[0]
            nbytes = buffer.next_ahead(committed)
            if not nbytes:
                self._due.popleft()
            elif self._tier.has_room(TierBytes(remote=nbytes)):
                buffer.make_ahead(committed)
                return Progress.MADE
            else:
                self._due.clear()  # the step that needs it says so
        return Progress.DONE

    def _next_commit(self) -> list[tuple[TieredBuffer, int]]:
        """What the next growth is to commit: of all layers alike, as far as the bound allows."""
        growing = self._growing()
        for part in _STEPS:
            due = list(_commits(growing, part))
            if self._total(due) <= self.bound:
                return due
        due = list(_commits(growing, 0))
        while due and self._total(due) > self.bound:
            due.pop()
        return due

    def _total(self, due: Sequence[tuple[TieredBuffer, int]]) -> int:
        """Bytes that would be held with all of `due` made."""
        return self.held_bytes() + sum(buffer.growth(size).remote for buffer, size in due)

    def _growing(self) -> list[LayerStorage]:
        return [layer for layer in self._layers if layer.committed < layer.capacity]


def _commits(layers: Sequence[LayerStorage], part: int) -> Iterator[tuple[TieredBuffer, int]]:
    """One slot more of each layer, and a `part`-th of what a commit takes beyond; none for 0."""
    for layer in layers:
        slots = layer.committed + 1
        slots += (layer.ahead(slots) - slots) // part if part else 0
        for buffer, row in zip(layer.buffers, layer.row_bytes, strict=True):
            yield buffer, slots * row
