"""Bandwidth and latency kernels: reads of a remote and a local range at once, writes, round trips.

Bandwidths are bytes per second, times seconds. A window is ctas * stages * piece_bytes: the bytes
that a part keeps requested and not yet arrived.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dak_inductor.cuda_runtime.kernel import LoadedKernel, load
from dak_inductor.cuda_runtime.nvrtc import KernelInstance, instance

if TYPE_CHECKING:
    import torch

THREADS = 128
MAXIMUM_STAGES = 32  # pipeline/bulk_reader.cuh
BARRIER_BYTES = 256  # pipeline/bulk_reader.cuh
_PART = struct.Struct("<QIIII")
_TAIL = struct.Struct("<QQ")
_WRITE = struct.Struct("<QIIQQ")
_ROUND_TRIP = struct.Struct("<QIII4xQ")
_COUNTER_WORDS = 4  # bytes, start, stop, checksum

STREAM_READ = instance("stream_read", threads=THREADS, checksum=False)
STREAM_CHECKSUM = instance("stream_read", threads=THREADS, checksum=True)
STREAM_WRITE = instance("stream_write", threads=THREADS, groups_in_flight=4)
ROUND_TRIP = instance("round_trip")
KERNELS: tuple[KernelInstance, ...] = (STREAM_READ, STREAM_CHECKSUM, STREAM_WRITE, ROUND_TRIP)


@dataclass(frozen=True, slots=True)
class Part:
    """A range and the CTAs that stream it. `address` and `piece_bytes` are multiples of 16."""

    address: int
    nbytes: int
    ctas: int
    stages: int
    piece_bytes: int

    def __post_init__(self) -> None:
        if self.address % 16 or self.piece_bytes % 16 or self.piece_bytes <= 0:
            raise ValueError(
                f"address {self.address:#x} and pieces of {self.piece_bytes} bytes must be "
                "multiples of 16 bytes"
            )
        if not 1 <= self.stages <= MAXIMUM_STAGES:
            raise ValueError(f"{self.stages} stages: 1 to {MAXIMUM_STAGES} are possible")
        if not 1 <= self.ctas <= self.pieces:
            raise ValueError(
                f"{self.ctas} CTAs for {self.pieces} pieces: each CTA needs a piece to start with"
            )

    @property
    def pieces(self) -> int:
        return self.nbytes // self.piece_bytes

    @property
    def window(self) -> int:
        return self.ctas * self.stages * self.piece_bytes

    @property
    def shared_bytes(self) -> int:
        return BARRIER_BYTES + self.stages * self.piece_bytes

    def pack(self) -> bytes:
        """As `StreamReadPart`."""
        return _PART.pack(self.address, self.piece_bytes, self.pieces, self.stages, self.ctas)


@dataclass(frozen=True, slots=True)
class StreamRates:
    """Bytes per second of each part while both were streaming; 0 for a part that was left out."""

    remote: float
    local: float


@dataclass(frozen=True, slots=True)
class StreamSums:
    """What a single pass read: bytes of each part, and the sum of all 32-bit words modulo 2**32."""

    remote_bytes: int
    local_bytes: int
    checksum: int


def stream_rates(
    device: torch.device, remote: Part | None, local: Part | None, *, seconds: float
) -> StreamRates:
    """Stream both parts for `seconds` on the current stream and wait for the rates."""
    return rates(stream_async(device, remote, local, seconds=seconds), remote, local)


def stream_async(
    device: torch.device, remote: Part | None, local: Part | None, *, seconds: float
) -> torch.Tensor:
    """As `stream_rates`, without waiting: the counters, for `rates`."""
    return _launch_read(STREAM_READ, device, remote, local, max(1, round(seconds * 1e9)))


def stream_checksum(device: torch.device, remote: Part | None, local: Part | None) -> StreamSums:
    """Read each part once and add up every word that arrived. Whole pieces only."""
    counters = _launch_read(STREAM_CHECKSUM, device, remote, local, 0).cpu()
    ctas = 0 if remote is None else remote.ctas
    return StreamSums(
        remote_bytes=int(counters[:ctas, 0].sum()),
        local_bytes=int(counters[ctas:, 0].sum()),
        checksum=int(counters[:, 3].sum()) % 2**32,
    )


def rates(counters: torch.Tensor, remote: Part | None, local: Part | None) -> StreamRates:
    """Rates from counters [ctas, (bytes, start ns, stop ns, checksum)], remote CTAs first."""
    table = counters.cpu()
    each = table[:, 0].double() / (table[:, 2] - table[:, 1]).double() * 1e9
    ctas = 0 if remote is None else remote.ctas
    return StreamRates(
        remote=float(each[:ctas].sum()) if remote is not None else 0.0,
        local=float(each[ctas:].sum()) if local is not None else 0.0,
    )


def write_rate(device: torch.device, part: Part, *, seconds: float) -> float:
    """Write zeros over `part` for `seconds` from its CTAs; `stages` is not used."""
    kernel = _load(STREAM_WRITE, device)
    counters = _counters(device, part.ctas)
    arguments = _WRITE.pack(
        part.address, part.piece_bytes, part.pieces, counters.data_ptr(), round(seconds * 1e9)
    )
    kernel.launch(
        grid=(part.ctas, 1, 1),
        block=(THREADS, 1, 1),
        arguments=[arguments],
        shared_bytes=part.piece_bytes,
    )
    return rates(counters, part, None).remote


def round_trip(device: torch.device, address: int, *, stride: int, loads: int) -> float:
    """Seconds per load of 4 bytes, each waiting for the one before, `stride` bytes apart."""
    import torch

    kernel = _load(ROUND_TRIP, device)
    result = torch.zeros(1, dtype=torch.int64, device=device)
    arguments = _ROUND_TRIP.pack(address, stride, loads, 0, result.data_ptr())
    kernel.launch(grid=(1, 1, 1), block=(1, 1, 1), arguments=[arguments])
    return int(result.item()) / loads * 1e-9


def _launch_read(
    instance_: KernelInstance,
    device: torch.device,
    remote: Part | None,
    local: Part | None,
    nanoseconds: int,
) -> torch.Tensor:
    import torch

    ctas = sum(part.ctas for part in (remote, local) if part is not None)
    fit = torch.cuda.get_device_properties(device).multi_processor_count
    if not 1 <= ctas <= fit:
        raise ValueError(f"{ctas} CTAs: a single wave of 1 to {fit} is needed on {device}")
    counters = _counters(device, ctas)
    _load(instance_, device).launch(
        grid=(ctas, 1, 1),
        block=(THREADS, 1, 1),
        arguments=[pack_read(remote, local, counters.data_ptr(), nanoseconds)],
        shared_bytes=max(part.shared_bytes for part in (remote, local) if part is not None),
    )
    return counters


def pack_read(remote: Part | None, local: Part | None, counters: int, nanoseconds: int) -> bytes:
    """As `StreamReadArguments`."""
    nothing = bytes(_PART.size)
    parts = [nothing if part is None else part.pack() for part in (remote, local)]
    return parts[0] + parts[1] + _TAIL.pack(counters, nanoseconds)


def _counters(device: torch.device, ctas: int) -> torch.Tensor:
    import torch

    return torch.zeros((ctas, _COUNTER_WORDS), dtype=torch.int64, device=device)


def _load(kernel: KernelInstance, device: torch.device) -> LoadedKernel:
    import torch

    index = torch.cuda.current_device() if device.index is None else device.index
    return load(kernel, index)
