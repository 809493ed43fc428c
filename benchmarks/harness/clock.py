"""What is left of the time that a benchmark may take."""

from __future__ import annotations

import time


class Clock:
    """From now on for so many seconds. `skipped` is what there was no time for."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.skipped: list[str] = []

    def allows(self, what: str, seconds: float = 1.0) -> bool:
        """Whether there is that much left; if not, it is noted."""
        if time.monotonic() + seconds < self._end:
            return True
        self.skipped.append(what)
        return False
