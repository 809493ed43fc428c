"""Buffers in the making: one thread creates pages, one maps them, the caller fills what is mapped.

Creating is the slowest of the three, so its thread must never wait for the others: it works ahead,
as far as the caller allows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from dak_inductor.errors import DeviceMemoryError, HostMemoryError

Pages = TypeVar("Pages")
Buffer = TypeVar("Buffer")


@dataclass(frozen=True, slots=True)
class PageStages(Generic[Pages, Buffer]):
    """What the threads do.

    create: (nbytes, split) -> pages; runs ahead, and raises where they do not fit.
    finish: (pages, split) -> buffer: maps them.
    again: (nbytes, split) -> buffer: both, for pages that did not fit ahead; the caller's thread.
    """

    create: Callable[[int, int], Pages]
    finish: Callable[[Pages, int], Buffer]
    again: Callable[[int, int], Buffer]


@dataclass(frozen=True, slots=True)
class _Coming(Generic[Pages, Buffer]):
    """A buffer that the threads have been asked for."""

    nbytes: int
    pages: Future[Pages | None]
    buffer: Future[Buffer | None]


class PagePipeline(Generic[Pages, Buffer]):
    """Buffers for (nbytes, split) in order, some of them made ahead.

    Args:
        stages: the work.
        requests: what is wanted, in order.
        ahead_bytes: the most that is made ahead; the next buffer always is.
    """

    def __init__(
        self,
        stages: PageStages[Pages, Buffer],
        requests: Sequence[tuple[int, int]],
        *,
        ahead_bytes: int,
    ) -> None:
        self._stages = stages
        self._requests = requests
        self._ahead_bytes = ahead_bytes
        self._started = 0
        self._halted = False
        self._coming: deque[_Coming[Pages, Buffer]] = deque()

    def buffers(self) -> Generator[Buffer, None, None]:
        """One buffer per request. Raises what `again` raises, at the buffer concerned.

        Where one did not fit ahead, those made behind it are given back first and no more than one
        is made ahead from there on: what it waits for may be released as the caller goes on.
        """
        with (
            ThreadPoolExecutor(1, thread_name_prefix="dak-pages") as creator,
            ThreadPoolExecutor(1, thread_name_prefix="dak-maps") as mapper,
        ):
            try:
                for position, (nbytes, split) in enumerate(self._requests):
                    self._start(position, creator, mapper)
                    buffer = self._next()
                    if buffer is None:
                        buffer = self._stages.again(nbytes, split)
                    self._start(position + 1, creator, mapper)
                    yield buffer
                    del buffer
            finally:
                self._give_back()

    def _start(
        self, position: int, creator: ThreadPoolExecutor, mapper: ThreadPoolExecutor
    ) -> None:
        """Set the threads to work on what may be made now, `position` in any case."""
        self._started = max(self._started, position)
        while self._started < len(self._requests):
            nbytes, split = self._requests[self._started]
            ahead = sum(coming.nbytes for coming in self._coming)
            if self._started > position and ahead + nbytes > self._ahead_bytes:
                return
            pages = creator.submit(self._create, nbytes, split)
            buffer = mapper.submit(self._finish, pages, split)
            self._coming.append(_Coming(nbytes, pages, buffer))
            self._started += 1

    def _next(self) -> Buffer | None:
        """The next buffer; None where it did not fit yet."""
        try:
            buffer = self._coming.popleft().buffer.result()
        except (DeviceMemoryError, HostMemoryError):
            buffer = None
        if buffer is None:
            self._give_back()
            self._ahead_bytes = 0
        return buffer

    def _give_back(self) -> None:
        """Drop what has been made and not been handed out, and stop making more."""
        self._halted = True
        self._started -= len(self._coming)
        for coming in self._coming:
            coming.pages.cancel()
            coming.buffer.cancel()
        while self._coming:
            buffer = self._coming.popleft().buffer
            if not buffer.cancelled():
                buffer.exception()  # wait; a failure is met again in the buffer's turn
        self._halted = False

    def _create(self, nbytes: int, split: int) -> Pages | None:
        return None if self._halted else self._stages.create(nbytes, split)

    def _finish(self, pages: Future[Pages | None], split: int) -> Buffer | None:
        made = pages.result()
        return None if made is None else self._stages.finish(made, split)
