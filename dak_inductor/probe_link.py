"""One link, measured: direct reads and their windows, writes, copies, latency.

Bandwidths are bytes per second, sizes bytes, times seconds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dak_inductor.cuda_runtime.nvrtc import extension
from dak_inductor.cuda_runtime.streaming import (
    Part,
    StreamRates,
    rates,
    round_trip,
    stream_async,
    stream_rates,
    write_rate,
)
from dak_inductor.hardware_profile import LinkProfile

if TYPE_CHECKING:
    import torch

MIB = 2**20
TOLERANCE = 0.02  # of the peak: what a window may cost the link or HBM
SECONDS = 0.01  # of one timed kernel
REPEATS = 3
REMOTE_PIECE = 8192
LOCAL_PIECE, LOCAL_STAGES = 16384, 6
COPY_PIECE = 4 * MIB

# CTAs x stages of 8 KiB pieces: windows from 64 KiB to 9 MiB
WINDOWS = (
    (8, 1),
    (16, 1),
    (24, 1),
    (16, 2),
    (16, 3),
    (16, 4),
    (16, 5),
    (16, 6),
    (16, 8),
    (16, 12),
    (16, 16),
    (16, 24),
    (32, 24),
    (48, 24),
)


@dataclass(frozen=True, slots=True)
class Range:
    """Device-visible memory."""

    address: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class WindowRates:
    """Rates of both parts at one window, and of HBM with the same CTAs and no remote reads."""

    window: int
    remote: float
    local: float
    local_alone: float


@dataclass(frozen=True, slots=True)
class WindowLimits:
    """`floor`: smallest window within 2% of link peak. `knee`: largest at which HBM loses 2%."""

    floor: int
    knee: int
    knee_seen: bool  # False: HBM had not suffered at the largest window tried


def window_limits(sweep: Sequence[WindowRates]) -> WindowLimits:
    """Floor and knee of a sweep over increasing windows."""
    rows = sorted(sweep, key=lambda row: row.window)
    peak = max(row.remote for row in rows)
    floor = next(row.window for row in rows if row.remote >= (1 - TOLERANCE) * peak)
    # below the floor nothing can be starved, so a loss there is noise; beyond the first window that
    # hurts, a lucky measurement must not count
    knee, knee_seen = floor, False
    for row in rows:
        if row.window <= floor:
            continue
        if row.local < (1 - TOLERANCE) * row.local_alone:
            knee_seen = True
            break
        knee = row.window
    return WindowLimits(floor=floor, knee=knee, knee_seen=knee_seen)


def local_part(local: Range, ctas: int) -> Part:
    """The HBM stream of `ctas` CTAs at full speed."""
    return Part(local.address, local.nbytes, ctas, LOCAL_STAGES, LOCAL_PIECE)


def median_rates(device: torch.device, remote: Part | None, local: Part | None) -> StreamRates:
    """Median of the repeats, after a warm-up."""
    stream_rates(device, remote, local, seconds=SECONDS / 5)
    runs = [stream_rates(device, remote, local, seconds=SECONDS) for _ in range(REPEATS)]
    return StreamRates(
        remote=statistics.median(run.remote for run in runs),
        local=statistics.median(run.local for run in runs),
    )


def sweep_windows(
    device: torch.device, remote: Range, local: Range, sm_count: int
) -> list[WindowRates]:
    """Rates of both sides over the windows whose CTAs leave half of the GPU to HBM."""
    alone: dict[int, float] = {}
    rows = []
    for ctas, stages in WINDOWS:
        if ctas > max(8, sm_count // 2):
            continue
        part = Part(remote.address, remote.nbytes, ctas, stages, REMOTE_PIECE)
        others = local_part(local, sm_count - ctas)
        if ctas not in alone:
            alone[ctas] = median_rates(device, None, others).local
        both = median_rates(device, part, others)
        rows.append(WindowRates(part.window, both.remote, both.local, alone[ctas]))
    return rows


def copy_rate(
    device: torch.device, destination: int, source: int, nbytes: int, *, piece: int | None = None
) -> float:
    """Copy-engine rate of one large copy, or of `piece` bytes at a time inside a CUDA graph."""
    if piece is None:
        seconds = timed(lambda: copy(device, destination, source, nbytes), repeats=REPEATS)
        return nbytes / seconds
    count = nbytes // piece

    def pieces() -> None:
        for offset in range(0, count * piece, piece):
            copy(device, destination + offset, source + offset, piece)

    return count * piece / timed(graph_of(device, pieces), repeats=REPEATS)


def copy(device: torch.device, destination: int, source: int, nbytes: int) -> None:
    """Queue a copy on torch's current stream."""
    import torch

    extension().copy_async(
        destination=destination,
        source=source,
        nbytes=nbytes,
        stream=torch.cuda.current_stream(device).cuda_stream,
        device=device.index,
    )


def interference(
    device: torch.device, remote: Range, local: Range, sm_count: int, copy_bandwidth: float
) -> float:
    """HBM bytes/s that streaming loses per byte/s that a copy engine brings in at the same time."""
    import torch

    stream = local_part(local, sm_count)
    size = min(remote.nbytes, local.nbytes)
    # the copies must outlast the kernel beside which they run
    copies = max(1, round(4 * SECONDS * copy_bandwidth / size))
    side = torch.cuda.Stream(device)
    losses = []
    for _ in range(REPEATS):
        alone = stream_rates(device, None, stream, seconds=SECONDS).local
        torch.cuda.synchronize(device)
        with torch.cuda.stream(side):
            for _ in range(copies):
                copy(device, local.address, remote.address, size)
        counters = stream_async(device, None, stream, seconds=SECONDS)
        torch.cuda.synchronize(device)
        losses.append(alone - rates(counters, None, stream).local)
    return max(0.0, statistics.median(losses)) / copy_bandwidth


def timed(work: Callable[[], None], *, repeats: int) -> float:
    """Median seconds of `work` on the current stream, after one warm-up."""
    import torch

    work()
    samples = []
    for _ in range(repeats):
        start = torch.cuda.Event(enable_timing=True)
        stop = torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop) * 1e-3)
    return statistics.median(samples)


def graph_of(device: torch.device, work: Callable[[], None]) -> Callable[[], None]:
    """`work` as a CUDA graph: call the result to replay it on the current stream."""
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph):
            work()
    return graph.replay


def measure_link(
    device: torch.device, tier: str, remote: Range, local: Range, sm_count: int, provenance: str
) -> LinkProfile:
    """The link to `remote`, whose bytes are overwritten, as are those of `local`."""
    sweep = sweep_windows(device, remote, local, sm_count)
    limits = window_limits(sweep)
    widest = Part(remote.address, remote.nbytes, min(16, sm_count), 12, REMOTE_PIECE)
    alone = median_rates(device, widest, None).remote
    size = min(remote.nbytes, local.nbytes)
    copy_bandwidth = copy_rate(device, local.address, remote.address, size)
    # lines of the second pass lie between those of the first, on the same pages
    stride, loads = 4224, min(4096, remote.nbytes // 4224 - 1)
    round_trip(device, remote.address, stride=stride, loads=loads)
    latency = round_trip(device, remote.address + stride // 2, stride=stride, loads=loads)
    if not limits.knee_seen:
        provenance += f"; no knee up to {limits.knee / 1e6:.1f} MB in flight"
    writers = Part(remote.address, remote.nbytes, min(32, sm_count), 1, REMOTE_PIECE)
    return LinkProfile(
        tier=tier,
        direct_bandwidth=max(alone, *(row.remote for row in sweep)),
        copy_bandwidth=copy_bandwidth,
        write_bandwidth=write_rate(device, writers, seconds=SECONDS),
        latency=latency,
        window_floor=limits.floor,
        window_knee=limits.knee,
        copy_interference=interference(device, remote, local, sm_count, copy_bandwidth),
        provenance=provenance,
        copy_out_bandwidth=copy_rate(device, remote.address, local.address, size),
        piece_copy_bandwidth=copy_rate(
            device, local.address, remote.address, size, piece=COPY_PIECE
        ),
    )
