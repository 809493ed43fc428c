"""The thread that makes pages before buffers grow into them.

There is one for the process, as long as there is something to make. What it works for it knows by
weak references only, so that memory goes with its owner.
"""

from __future__ import annotations

import atexit
import enum
import os
import threading
import time
import weakref
from collections import deque
from typing import Protocol

_CAPTURE_POLL_SECONDS = 0.002
_LONGEST_REST_SECONDS = 0.005
_EXIT_SECONDS = 5.0


class Progress(enum.Enum):
    """What a call of `make_one` did."""

    MADE = "made"
    WAITING = "waiting"  # for a capture to end
    DONE = "done"


class Growing(Protocol):
    """Something that pages are made for."""

    def make_one(self) -> Progress:
        """Make one allocation. Raises nothing: who needs the page meets the failure."""

    def give_back(self) -> bool:
        """Stop, and give back what was made and not used; whether there was any."""


class PageMaker:
    """Makes pages for all who ask, in turn. Any thread may call it."""

    def __init__(self) -> None:
        self._renew()
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        """As at the start: a forked child has no such thread, and its lock may be held."""
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._queue: deque[weakref.ref[Growing]] = deque()
        self._known: weakref.WeakSet[Growing] = weakref.WeakSet()

    def ask(self, growing: Growing) -> None:
        """Make pages for it, until its `make_one` says that it is done. Waits for nothing."""
        with self._lock:
            if self._stop.is_set():
                return
            self._known.add(growing)
            self._queue.append(weakref.ref(growing))
            if self._thread is None:
                self._start()

    def give_back(self) -> bool:
        """Give back all that was made and not used, where memory is short; whether there was any.

        Waits for a page in the making.
        """
        with self._lock:
            known = list(self._known)
        given_back = [growing.give_back() for growing in known]  # not under the lock: it waits
        return any(given_back)

    def wait(self, seconds: float = 10.0) -> bool:
        """Wait until nothing is to be made; False if that took longer than `seconds`."""
        with self._idle:
            return self._idle.wait_for(lambda: self._thread is None, seconds)

    def stop(self) -> None:
        """End the thread, and make no more."""
        with self._lock:
            self._stop.set()
            self._queue.clear()
            thread = self._thread
        if thread is not None:
            thread.join(_EXIT_SECONDS)

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="dak-pages-ahead", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # a limit on threads: pages are made where they are needed
            self._queue.clear()
            return
        self._thread = thread

    def _run(self) -> None:
        while (growing := self._next()) is not None:
            start = time.perf_counter()
            progress = growing.make_one()
            if progress is not Progress.DONE:
                with self._lock:
                    if not self._stop.is_set():
                        self._queue.append(weakref.ref(growing))
            del growing
            if progress is Progress.WAITING:
                self._stop.wait(_CAPTURE_POLL_SECONDS)
            elif progress is Progress.MADE:
                # Creations hold up other calls into the driver: leave every second moment to them.
                self._stop.wait(min(time.perf_counter() - start, _LONGEST_REST_SECONDS))

    def _next(self) -> Growing | None:
        with self._lock:
            while self._queue:
                growing = self._queue.popleft()()
                if growing is not None:
                    return growing
            self._thread = None
            self._idle.notify_all()
            return None


PAGE_MAKER = PageMaker()
"""The one of this process."""


@atexit.register
def _at_exit() -> None:
    """While the thread can still return from the driver into the interpreter."""
    PAGE_MAKER.stop()
