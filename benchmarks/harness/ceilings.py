"""Measures the ceilings of this machine: HBM stream, the link both ways, peak matrix rate.

Each benchmark calls `measure` once, so that results and ceilings come from the same run. A
ceiling is the best of the methods that work here; each method's figure is kept in the record.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dak_inductor.benchmarks.harness.copy_stream import remote_copy
from dak_inductor.benchmarks.harness.timing import TimingRule, time_calls
from dak_inductor.benchmarks.harness.yardstick import Ceilings
from dak_inductor.cuda_runtime.tiers import open_tier

GEMM = (4096, 28672, 8192)
"""M, N, K of the matrix product whose rate counts as the peak."""

STREAM_BYTES = 4 << 30
LINK_BYTES = 1 << 30
PROGRAMS_PER_SM = 4
LINK_CTAS, LINK_STAGES = 16, 8
LINK_PROGRAMS = 32
"""Enough to fill the link, few enough not to congest it."""


def measure(
    device: torch.device, remote: str, rule: TimingRule, *, host_memory: int | None = None
) -> Ceilings:
    """The ceilings between `device` and `remote`."""
    if device.type != "cuda":
        return _measure_cpu(rule)
    methods: dict[str, str] = {}
    with torch.cuda.device(device):
        hbm = _best(_hbm_methods(device, rule), "hbm_stream", methods)
        direct = _best(_direct_methods(device, remote, rule, host_memory), "link_direct", methods)
        copy, write = _copy_bandwidths(device, remote, rule)
        flops = _matmul_flops(device, GEMM, torch.bfloat16, rule)
        torch.cuda.empty_cache()
    methods["link_copy"] = f"one copy of {LINK_BYTES >> 20} MiB, copy engine"
    methods["matmul_flops"] = f"torch.mm bfloat16 M, N, K = {GEMM}"
    return Ceilings(hbm, direct, copy, flops, write, tuple(methods.items()))


def _best(candidates: dict[str, Callable[[], float]], name: str, methods: dict[str, str]) -> float:
    """The largest figure of those that can be measured here, with a line on each."""
    figures: dict[str, float] = {}
    lines = []
    for method, run in candidates.items():
        try:
            figures[method] = run()
            lines.append(f"{method}: {figures[method] / 1e9:.1f} GB/s")
        except Exception as error:  # a missing method is no failure while another one works
            lines.append(f"{method}: not measured ({type(error).__name__}: {error})")
    methods[name] = "; ".join(lines)
    if not figures:
        raise RuntimeError(f"no method could measure {name}: {methods[name]}")
    return max(figures.values())


def _random_words(nbytes: int, device: torch.device) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, (nbytes // 4,), dtype=torch.int32, device=device)


def _hbm_methods(device: torch.device, rule: TimingRule) -> dict[str, Callable[[], float]]:
    def plain_loads() -> float:
        return _stream_bandwidth(_random_words(STREAM_BYTES, device), None, rule)

    def bulk_copies() -> float:
        from dak_inductor.probe_link import Range, local_part, median_rates

        words = _random_words(STREAM_BYTES, device)
        sm_count = torch.cuda.get_device_properties(device).multi_processor_count
        part = local_part(Range(words.data_ptr(), words.nbytes), sm_count)
        return median_rates(device, None, part).local

    def device_copy() -> float:
        source = _random_words(STREAM_BYTES // 2, device)
        target = torch.empty_like(source)
        timing = time_calls([lambda: target.copy_(source)], device=device, rule=rule, method="copy")
        return 2 * source.nbytes / timing.seconds

    return {
        "bulk copies into shared memory": bulk_copies,
        "16-byte loads": plain_loads,
        "device copy, read + written": device_copy,
    }


def _direct_methods(
    device: torch.device, remote: str, rule: TimingRule, host_memory: int | None
) -> dict[str, Callable[[], float]]:
    def remote_words() -> Tensor:
        tier = open_tier(remote, device=device, host_memory=host_memory)
        words = tier.allocate(LINK_BYTES, split=0).tensor(torch.int32, (LINK_BYTES // 4,))
        return words.copy_(_random_words(LINK_BYTES, device))

    def plain_loads() -> float:
        return _stream_bandwidth(remote_words(), LINK_PROGRAMS, rule)

    def bulk_copies() -> float:
        from dak_inductor.cuda_runtime.streaming import Part
        from dak_inductor.probe_link import REMOTE_PIECE, median_rates

        words = remote_words()
        part = Part(words.data_ptr(), words.nbytes, LINK_CTAS, LINK_STAGES, REMOTE_PIECE)
        return median_rates(device, part, None).remote

    return {"bulk copies into shared memory": bulk_copies, "16-byte loads": plain_loads}


def _stream_bandwidth(words: Tensor, programs: int | None, rule: TimingRule) -> float:
    from dak_inductor.benchmarks.harness.stream_kernel import check_read, stream_read

    sm_count = torch.cuda.get_device_properties(words.device).multi_processor_count
    count = programs or PROGRAMS_PER_SM * sm_count
    partial = torch.empty(count, dtype=torch.int32, device=words.device)
    check_read(words, partial)
    timing = time_calls(
        [lambda: stream_read(words, partial)], device=words.device, rule=rule, method="stream"
    )
    return words.nbytes / timing.seconds


def _copy_bandwidths(device: torch.device, remote: str, rule: TimingRule) -> tuple[float, float]:
    """Remote tier to device and back by copy engine, bytes/s."""
    local = _random_words(LINK_BYTES, device)
    far = remote_copy(local, remote)

    def seconds(target: Tensor, source: Tensor) -> float:
        def call() -> None:
            target.copy_(source, non_blocking=True)

        return time_calls([call], device=device, rule=rule, method="copy").seconds

    return LINK_BYTES / seconds(local, far), LINK_BYTES / seconds(far, local)


def _matmul_flops(
    device: torch.device, sizes: tuple[int, int, int], dtype: torch.dtype, rule: TimingRule
) -> float:
    M, N, K = sizes
    left = torch.randn(M, K, device=device, dtype=dtype)
    right = torch.randn(N, K, device=device, dtype=dtype)
    out = torch.empty(M, N, device=device, dtype=dtype)

    def call() -> None:
        torch.mm(left, right.t(), out=out)

    timing = time_calls([call], device=device, rule=rule, method="matmul")
    return 2 * M * N * K / timing.seconds


def _measure_cpu(rule: TimingRule) -> Ceilings:
    """Figures of CPU memory: for testing the harness where there is no GPU, never for results."""
    device = torch.device("cpu")
    words = _random_words(64 << 20, device)
    target = torch.empty_like(words)
    copy = time_calls([lambda: target.copy_(words)], device=device, rule=rule, method="copy")
    bandwidth = 2 * words.nbytes / copy.seconds
    flops = _matmul_flops(device, (256, 256, 256), torch.float32, rule)
    method = "CPU memory copy; no GPU here"
    names = ("hbm_stream", "link_direct", "link_copy")
    return Ceilings(
        bandwidth, bandwidth, bandwidth, flops, bandwidth, tuple((name, method) for name in names)
    )
