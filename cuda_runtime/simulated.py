"""A tier for machines without a GPU: the same interface and arithmetic, all bytes in CPU memory.

Which page is "local" is bookkeeping only, but the bookkeeping is exact: capacity, bytes moved,
peaks, rounding to pages, and failures on demand, so that everything above this layer can be tested
anywhere.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.host_memory import available_host_memory, check_host_memory
from dak_inductor.cuda_runtime.page_maker import PAGE_MAKER
from dak_inductor.cuda_runtime.simulated_buffer import SimulatedBuffer
from dak_inductor.cuda_runtime.tier import Tier, creation_split
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.errors import DeviceMemoryError, HostMemoryError, OptionError

DEFAULT_PAGE_BYTES = 4096


@dataclass(slots=True)
class SimulatedCounters:
    """What a simulated tier has done. The peaks are the most ever held at once, by place."""

    bytes_moved: int = 0
    held: TierBytes = field(default_factory=TierBytes)
    peak_local_bytes: int = 0
    peak_remote_bytes: int = 0
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False, compare=False)

    def hold(self, change: TierBytes) -> None:
        with self._lock:
            self.held = self.held + change
            self.peak_local_bytes = max(self.peak_local_bytes, self.held.local)
            self.peak_remote_bytes = max(self.peak_remote_bytes, self.held.remote)


class SimulatedTier(Tier):
    """Both tiers in CPU memory.

    Args:
        page_bytes: granularity of moves, a power of two of at least 256.
        host_memory: bytes the remote tier may hold in all; None: what the machine has.
        local_capacity: bytes of pages the "GPU" may hold in all; None: no limit.

    `capturing` set makes it behave as while a CUDA graph is being captured.
    """

    name = "simulated"
    makes_ahead = True

    def __init__(
        self,
        *,
        page_bytes: int = DEFAULT_PAGE_BYTES,
        host_memory: int | None = None,
        local_capacity: int | None = None,
    ) -> None:
        if page_bytes < 256 or page_bytes & (page_bytes - 1):
            raise OptionError(
                f"page_bytes={page_bytes}: it is a power of two of at least 256, such as 4096"
            )
        self.page_bytes = page_bytes
        self.host_memory = host_memory
        self.local_capacity = local_capacity
        self.counters = SimulatedCounters()
        self.capturing = False
        self._failures: dict[str, int] = {}

    def inject_failure(self, operation: str, *, after: int = 0) -> None:
        """Make one operation fail, `after` more have succeeded.

        "allocate", "write", "page" (of a move or a growth), or "ahead" (a page made ahead).
        """
        if operation not in ("allocate", "write", "page", "ahead"):
            raise OptionError(
                f"unknown operation {operation!r}: 'allocate', 'write', 'page' or 'ahead'"
            )
        self._failures[operation] = after

    def allocate(self, nbytes: int, *, split: int) -> SimulatedBuffer:
        split = creation_split(split, nbytes)
        held = self.held_bytes(nbytes, split)
        self.check_local(held.local)
        needed = held.total if self.host_memory is None else held.remote
        self.check_host(needed, f"a simulated tensor of {nbytes} bytes")
        if self.due("allocate"):
            raise HostMemoryError(f"injected failure: {nbytes} bytes were not allocated")
        buffer = SimulatedBuffer(self, nbytes, split, held.total // self.page_bytes)
        address_table.register(buffer)
        return buffer

    def allocate_growing(self, nbytes: int, *, split: int) -> SimulatedBuffer:
        split = creation_split(split, nbytes)
        pages = self.held_bytes(nbytes, split).total // self.page_bytes
        buffer = SimulatedBuffer(self, nbytes, split, pages, growing=True)
        address_table.register(buffer)
        return buffer

    def check_growth(self, more: TierBytes, what: str) -> None:
        self.check_local(more.local)
        needed = more.total if self.host_memory is None else more.remote
        if needed:
            self.check_host(needed, what)

    def has_room(self, more: TierBytes) -> bool:
        if self.host_memory is None:
            return more.total <= available_host_memory()
        return more.remote + self.counters.held.remote <= self.host_memory

    def capture_is_open(self) -> bool:
        return self.capturing

    def reserve(
        self, remote_bytes: int, *, peak_bytes: int | None = None, prepare: bool = True
    ) -> None:
        self.check_host(
            remote_bytes if peak_bytes is None or self.host_memory is not None else peak_bytes,
            f"offloading {remote_bytes / 1e9:.2f} GB to the simulated tier",
        )

    def check_host(self, more: int, what: str) -> None:
        """Raise HostMemoryError if `more` bytes would not fit, pages made ahead given back."""
        try:
            check_host_memory(more, self.host_memory, what, taken=self.counters.held.remote)
        except HostMemoryError:
            if not PAGE_MAKER.give_back():
                raise
            check_host_memory(more, self.host_memory, what, taken=self.counters.held.remote)

    def check_local(self, more: int) -> None:
        """Raise DeviceMemoryError if `more` bytes of pages would not fit the "GPU"."""
        held = self.counters.held.local
        if self.local_capacity is not None and held + more > self.local_capacity:
            raise DeviceMemoryError(
                f"the simulated GPU holds {held} of {self.local_capacity} bytes; "
                f"{more} more do not fit"
            )

    def due(self, operation: str) -> bool:
        """Counts down an injected failure; True when it is due."""
        left = self._failures.get(operation)
        if left is None:
            return False
        if left > 0:
            self._failures[operation] = left - 1
            return False
        del self._failures[operation]
        return True
