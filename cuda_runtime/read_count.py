"""Counting on the device what a stock kernel or a copy reads of a tiered buffer."""

from __future__ import annotations

import struct
from collections.abc import Sequence

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
    for first in range(0, len(reads), _READS):
        part = reads[first : first + _READS]
        padded = (*part, *[(0, 0)] * (_READS - len(part)))
        arguments = _HEAD.pack(record, len(part), 1 if first == 0 else 0)
        arguments += b"".join(_READ.pack(start, size) for start, size in padded)
        kernel = load(COUNT_READS, device_index)
        kernel.launch(grid=(1, 1, 1), block=(32, 1, 1), arguments=[arguments])
