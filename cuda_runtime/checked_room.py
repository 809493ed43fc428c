"""Room for pages that are made one after the other, checked for many of them at once.

What host memory can be taken is read from files of the kernel, which sums up counters of all CPUs
for them: for each of a model's tensors that was a part of its load.
"""

from __future__ import annotations

from typing import Protocol

from dak_inductor.cuda_runtime.tier_bytes import TierBytes

AT_ONCE = 1 << 30
"""Bytes of the remote tier to look for beyond what is needed now."""


class RoomOfTier(Protocol):
    """What is asked of a tier."""

    def has_room(self, more: TierBytes) -> bool: ...

    def check_room(self, more: TierBytes, what: str) -> None: ...


class CheckedRoom:
    """Used by one thread. With `at_once` 0 all that is needed is looked for each time."""

    def __init__(self, tier: RoomOfTier, at_once: int = AT_ONCE) -> None:
        self._tier, self._at_once = tier, at_once
        self._left = 0  # of the remote bytes that were found free

    def need(self, held: TierBytes, what: str) -> None:
        """Raise HostMemoryError or DeviceMemoryError unless `held` fits. Remote bytes that fitted
        when more than these were looked for are not looked for again."""
        if held.remote > self._left:
            ahead = TierBytes(held.local, held.remote + self._at_once)
            if self._tier.has_room(ahead):
                self._left = ahead.remote
            else:
                self._tier.check_room(held, what)
                self._left = held.remote
        else:
            self._tier.check_room(TierBytes(held.local, 0), what)
        self._left -= held.remote
