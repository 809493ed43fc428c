"""Counting on the device what a stock kernel or a copy reads of a tiered buffer."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

from dak_inductor.cuda_runtime.kernel import load
from dak_inductor.cuda_runtime.nvrtc import KernelInstance, instance

COUNT_READS = instance("count_reads")
KERNELS: tuple[KernelInstance, ...] = (COUNT_READS,)
_READS = 4  # of a launch, as kernels/count_reads.cu has
_HEAD = struct.Struct("<QII")
_READ = struct.Struct("<QQ")


def queue_count(record: int, reads: Sequence[tuple[int, int]], *, device_index: int) -> None:
    """Add one call that reads these (start, size) bytes of a buffer to its record.

    Args:
        record: device address of the buffer's record (`device_records`).

    Queued on torch's current stream: each replay of a graph captured over it counts by the split of
    that moment. Raises CompilationError, DriverError.
    """
    kernel = load(COUNT_READS, device_index)
    for first in range(0, len(reads), _READS):
        arguments = _packed(record, tuple(reads[first : first + _READS]), first == 0)
        kernel.launch(grid=(1, 1, 1), block=(32, 1, 1), arguments=[arguments])


@lru_cache(maxsize=8192)
def _packed(record: int, reads: tuple[tuple[int, int], ...], first: bool) -> bytes:
    """Arguments of one launch: a model's products read the same bytes at each step."""
    padded = (*reads, *[(0, 0)] * (_READS - len(reads)))
    arguments = _HEAD.pack(record, len(reads), int(first))
    return arguments + b"".join(_READ.pack(start, size) for start, size in padded)
