"""Which tiered buffer an address belongs to.

Process-wide. Lookups happen at every launch of an op, so they bisect an immutable snapshot without
a lock; registrations replace the snapshot under one. Entries are weak: the table keeps no memory
alive, and a buffer that dies is forgotten.
"""

from __future__ import annotations

import os
import threading
import weakref
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass

from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """Start addresses in order, and for each the end address and a weak reference of the buffer."""

    starts: tuple[int, ...] = ()
    entries: tuple[tuple[int, weakref.ref[TieredBuffer]], ...] = ()


_lock = threading.Lock()
_snapshot = _Snapshot()
# A weak reference's callback may run anywhere, even inside a registration: it only leaves a note.
_dead: deque[weakref.ref[TieredBuffer]] = deque()


def register(buffer: TieredBuffer) -> None:
    """Enter a buffer; any address in [address, address + nbytes) will find it while it lives."""
    global _snapshot
    reference = weakref.ref(buffer, _dead.append)
    with _lock:
        kept = _without_dead(_snapshot)
        at = bisect_right(kept.starts, buffer.address)
        end = buffer.address + max(buffer.nbytes, 1)
        _snapshot = _Snapshot(
            (*kept.starts[:at], buffer.address, *kept.starts[at:]),
            (*kept.entries[:at], (end, reference), *kept.entries[at:]),
        )


def lookup(address: int) -> TieredBuffer | None:
    """The live buffer that holds `address`, or None. O(log n), no lock.

    Raises TieredTensorError in a forked child for a buffer of the parent's CUDA memory.
    """
    snapshot = _snapshot
    at = bisect_right(snapshot.starts, address) - 1
    if at < 0:
        return None
    end, reference = snapshot.entries[at]
    if address >= end:
        return None
    buffer = reference()
    if buffer is None:
        return None
    if not buffer.usable:
        buffer.check_usable()
    return buffer


def forget(buffer: TieredBuffer) -> None:
    """Remove a buffer; no error if it is not there."""
    global _snapshot
    with _lock:
        kept = _without_dead(_snapshot)
        _snapshot = _filtered(kept, {i for i, e in enumerate(kept.entries) if e[1]() is buffer})


def live_buffers() -> list[TieredBuffer]:
    """All live buffers, in address order."""
    return [buffer for _, reference in _snapshot.entries if (buffer := reference()) is not None]


def _without_dead(snapshot: _Snapshot) -> _Snapshot:
    if not _dead:
        return snapshot
    _dead.clear()
    return _filtered(snapshot, {i for i, e in enumerate(snapshot.entries) if e[1]() is None})


def _filtered(snapshot: _Snapshot, drop: set[int]) -> _Snapshot:
    if not drop:
        return snapshot
    return _Snapshot(
        tuple(start for i, start in enumerate(snapshot.starts) if i not in drop),
        tuple(entry for i, entry in enumerate(snapshot.entries) if i not in drop),
    )


def _in_forked_child() -> None:
    """CUDA memory is not usable in a forked child; and the parent's lock may have been held."""
    global _lock
    _lock = threading.Lock()
    for buffer in live_buffers():
        if buffer.device.type == "cuda":
            buffer.usable = False


os.register_at_fork(after_in_child=_in_forked_child)
