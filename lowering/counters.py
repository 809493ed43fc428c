"""Bytes that operators read, by tier: what happened, not what was planned.

Kept on the host, for reads that no kernel counts on the device (`device_counters`): on the
simulated tier each dak:: op counts what it touches; on CUDA stock kernels cannot count, so the
compiled graph adds the bytes of its operator table once per call (`dak_inductor.binding`).
"""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import dataclass

from dak_inductor.cuda_runtime.tier_bytes import TierBytes


@dataclass(frozen=True, slots=True)
class ReadCount:
    """Reads of one tensor by one kind of op since the last reset.

    `bytes` are summed over `calls`. `peak_window` is the most remote bytes that one kernel had
    requested and not yet received; 0 where no kernel measured it.
    """

    kind: str
    tensor: str
    calls: int
    bytes: TierBytes
    peak_window: int = 0


_lock = threading.Lock()
_calls: dict[tuple[str, str], int] = defaultdict(int)
_local: dict[tuple[str, str], int] = defaultdict(int)
_remote: dict[tuple[str, str], int] = defaultdict(int)


def record(kind: str, tensor: str, read: TierBytes, calls: int = 1) -> None:
    """Add `read` bytes of `tensor`, read by `calls` ops of this kind."""
    key = (kind, tensor)
    with _lock:
        _calls[key] += calls
        _local[key] += read.local
        _remote[key] += read.remote


def snapshot() -> tuple[ReadCount, ...]:
    """All counts since the last reset, in the order in which the tensors were first read."""
    with _lock:
        return tuple(
            ReadCount(kind, tensor, calls, TierBytes(_local[kind, tensor], _remote[kind, tensor]))
            for (kind, tensor), calls in _calls.items()
        )


def total() -> TierBytes:
    """Bytes read by tier since the last reset, over all tensors."""
    with _lock:
        return TierBytes(sum(_local.values()), sum(_remote.values()))


def reset() -> None:
    """Forget all counts."""
    with _lock:
        for table in (_calls, _local, _remote):
            table.clear()
