"""`dak probe`: what this machine can do, measured in under a minute and kept for the planner."""

from __future__ import annotations

import datetime
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dak_inductor.cuda_runtime.host_memory import check_host_memory
from dak_inductor.cuda_runtime.kernel import architecture
from dak_inductor.cuda_runtime.nvrtc import extension
from dak_inductor.errors import DeviceMemoryError, TierError, UnsupportedDriverError
from dak_inductor.hardware import device_name, gpu_uuid, save
from dak_inductor.hardware_profile import HardwareProfile, LinkProfile
from dak_inductor.probe_link import (
    Range,
    graph_of,
    local_part,
    measure_link,
    median_rates,
    timed,
)
from dak_inductor.quantity_text import count_text

if TYPE_CHECKING:
    import torch
    from rich.table import Table

log = logging.getLogger(__name__)

LOCAL_BYTES = 2**31  # far past L2
REMOTE_BYTES = 2**30  # a power of two: torch rounds pinned memory up to one
MATMUL_SIZE = 8192
FLOOR_OPERATORS = 1000


def probe(
    device: torch.device | int | str | None = None, remotes: Iterable[str] | None = None
) -> HardwareProfile:
    """Measure the GPU and its links to `remotes`: by default the CPU and every peer in reach.

    Takes 2 GiB of GPU memory, and 1 GiB of pinned host memory or of each peer in turn. The machine
    should be idle. The profile is saved, and `hardware.current` answers it from now on.

    Raises UnsupportedDriverError without a usable GPU, TierError for a remote that does not exist,
    HostMemoryError and DeviceMemoryError where the buffers do not fit.
    """
    import torch

    chosen = _gpu(device)
    tiers = _remotes(chosen, remotes)
    extension()
    architecture(chosen.index)
    try:
        with torch.cuda.device(chosen), _out_of_memory(chosen):
            profile = _measure(chosen, tiers)
    finally:
        _give_back()
    where = save(profile, gpu_uuid(torch.cuda.get_device_properties(chosen)))
    if where is None:
        log.warning("the hardware profile could not be saved: the cache folder is not writable")
    else:
        log.info("hardware profile saved to %s", where)
    return profile


def _measure(device: torch.device, remotes: tuple[str, ...]) -> HardwareProfile:
    import torch

    properties = torch.cuda.get_device_properties(device)
    sm_count = properties.multi_processor_count
    stamp = f"measured {datetime.date.today().isoformat()} on {properties.name}, {_software()}"
    flops = {
        "bfloat16": matmul_rate(device, torch.bfloat16),
        "float16": matmul_rate(device, torch.float16),
    }
    operator_floor = operator_time(device)
    buffer = torch.zeros(LOCAL_BYTES, dtype=torch.uint8, device=device)
    local = Range(buffer.data_ptr(), LOCAL_BYTES)
    hbm_bandwidth = median_rates(device, None, local_part(local, sm_count)).local
    links: list[tuple[str, LinkProfile]] = []
    for name in remotes:
        tier = "cpu" if name == "cpu" else "peer"
        with _remote_buffer(device, name) as remote:
            link = measure_link(device, tier, remote, local, sm_count, f"{stamp}, remote {name}")
        log.info("%s: %.1f GB/s direct", name, link.direct_bandwidth / 1e9)
        links.append((name, link))
    return HardwareProfile(
        name="measured",
        gpu=properties.name,
        sm_count=sm_count,
        memory_bytes=properties.total_memory,
        hbm_bandwidth=hbm_bandwidth,
        matmul_flops=flops,
        operator_floor=operator_floor,
        links=slowest_by_tier(links),
        provenance=f"{stamp}; {describe_links(links)}",
        compute_capability=f"{properties.major}.{properties.minor}",
    )


def slowest_by_tier(links: list[tuple[str, LinkProfile]]) -> dict[str, LinkProfile]:
    """A profile knows peers as one tier: plans that hold for the slowest hold for all."""
    chosen: dict[str, LinkProfile] = {}
    for _, link in links:
        other = chosen.get(link.tier)
        if other is None or link.direct_bandwidth < other.direct_bandwidth:
            chosen[link.tier] = link
    return chosen


def describe_links(links: list[tuple[str, LinkProfile]]) -> str:
    """Every link in a few words, since a profile keeps the slowest peer only."""
    words = [
        f"{name} {link.direct_bandwidth / 1e9:.1f} GB/s direct, {link.copy_bandwidth / 1e9:.1f} "
        "by copy engine"
        for name, link in links
    ]
    return "; ".join(words) if words else "no links"


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Dense FLOP/s of a large product of random data (zeros would draw less power)."""
    import torch

    shape = (MATMUL_SIZE, MATMUL_SIZE)
    left, right = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    count = 10

    def products() -> None:
        for _ in range(count):
            torch.mm(left, right, out=out)

    return count * 2 * MATMUL_SIZE**3 / timed(products, repeats=5)


def operator_time(device: torch.device) -> float:
    """Seconds that one tiny kernel takes inside a CUDA graph of many."""
    import torch

    values = torch.zeros(16, device=device)

    def operators() -> None:
        for _ in range(FLOOR_OPERATORS):
            values.add_(1)

    operators()
    return timed(graph_of(device, operators), repeats=5) / FLOOR_OPERATORS


@contextmanager
def _remote_buffer(device: torch.device, name: str) -> Iterator[Range]:
    """Memory of a tier that kernels on `device` can address."""
    import torch

    if name == "cpu":
        check_host_memory(REMOTE_BYTES, None, "dak probe")
        buffer = torch.zeros(REMOTE_BYTES, dtype=torch.uint8, pin_memory=True)
    else:
        buffer = torch.zeros(REMOTE_BYTES, dtype=torch.uint8, device=name)
        # torch enables access between two GPUs at the first copy, for the direction of that copy
        here = torch.zeros(16, dtype=torch.uint8, device=device)
        buffer[:16].copy_(here)
        here.copy_(buffer[:16])
        torch.cuda.synchronize(name)
    torch.cuda.synchronize(device)
    yield Range(buffer.data_ptr(), REMOTE_BYTES)
    torch.cuda.synchronize(device)


def _gpu(device: torch.device | int | str | None) -> torch.device:
    import torch

    if not torch.cuda.is_available():
        raise UnsupportedDriverError(
            "dak probe measures a GPU, and torch sees none here: check nvidia-smi, and that torch "
            "was built for CUDA. Planning needs no GPU: name a shipped profile, as in "
            "`dak plan --hardware h200`"
        )
    chosen = torch.device(device_name(device))
    if chosen.type != "cuda":
        raise TierError(f"dak probe measures a GPU; {chosen} is none: name a device such as cuda:0")
    index = torch.cuda.current_device() if chosen.index is None else chosen.index
    if index >= torch.cuda.device_count():
        raise TierError(
            f"there is no {chosen}: torch sees {count_text(torch.cuda.device_count(), 'GPU')}"
        )
    return torch.device("cuda", index)


def _remotes(device: torch.device, asked: Iterable[str] | None) -> tuple[str, ...]:
    import torch

    count = torch.cuda.device_count()
    peers = [f"cuda:{i}" for i in range(count) if i != device.index]
    in_reach = [
        name for name in peers if torch.cuda.can_device_access_peer(device, torch.device(name))
    ]
    if asked is None:
        for name in sorted(set(peers) - set(in_reach)):
            log.info("%s cannot read the memory of %s: not measured", device, name)
        return ("cpu", *in_reach)
    names = (asked,) if isinstance(asked, str) else tuple(dict.fromkeys(asked))
    for name in names:
        if name != "cpu" and name not in in_reach:
            raise TierError(
                f"remote {name!r} cannot be measured from {device}; there are: "
                f"{', '.join(['cpu', *in_reach])}"
            )
    return names


def _give_back() -> None:
    """torch keeps freed buffers for itself; what the probe took is needed for tiers."""
    import torch

    torch.cuda.empty_cache()
    empty_pinned = getattr(torch._C, "_host_emptyCache", None)
    if empty_pinned is not None:
        empty_pinned()


@contextmanager
def _out_of_memory(device: torch.device) -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise DeviceMemoryError(
            f"dak probe needs {LOCAL_BYTES / 1e9:.1f} GB on {device}, and {REMOTE_BYTES / 1e9:.1f} "
            f"GB on each peer; {free / 1e9:.1f} of {total / 1e9:.1f} GB are free on {device}: stop "
            "other programs on these GPUs"
        ) from error


def _software() -> str:
    import torch

    return f"driver {_driver_version()}, CUDA {torch.version.cuda}, torch {torch.__version__}"


def _driver_version(path: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Such as "580.65.06"; torch knows only the CUDA version that a driver supports."""
    try:
        found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", path.read_text())
    except OSError:
        return "unknown"
    return found.group() if found else "unknown"


def render(profile: HardwareProfile) -> Table:
    """The profile as a table for people."""
    from rich.table import Table

    table = Table(title=f"{profile.gpu} ({profile.name})", caption=profile.provenance)
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_column("unit")
    for what, value, unit in rows(profile):
        table.add_row(what, value, unit)
    return table


def rows(profile: HardwareProfile) -> list[tuple[str, str, str]]:
    """(what, value, unit) of every figure; figures that are not known are left out."""
    found = [
        ("SMs", f"{profile.sm_count}", ""),
        ("memory", f"{profile.memory_bytes / 1e9:.1f}", "GB"),
        ("HBM stream", f"{profile.hbm_bandwidth / 1e9:.0f}", "GB/s"),
    ]
    for dtype, flops in profile.matmul_flops.items():
        found.append((f"dense {dtype}", f"{flops / 1e12:.0f}", "TFLOP/s"))
    found.append(("operator floor in a CUDA graph", f"{profile.operator_floor * 1e6:.2f}", "us"))
    for tier, link in profile.links.items():
        for what, bandwidth in (
            ("direct reads", link.direct_bandwidth),
            ("copy engine in", link.copy_bandwidth),
            ("copy engine in, 4 MiB pieces", link.piece_copy_bandwidth),
            ("copy engine out", link.copy_out_bandwidth),
            ("writes", link.write_bandwidth),
        ):
            if bandwidth > 0:
                found.append((f"{tier}: {what}", f"{bandwidth / 1e9:.1f}", "GB/s"))
        balance = link.direct_bandwidth / (link.direct_bandwidth + profile.hbm_bandwidth)
        found += [
            (f"{tier}: balance point", f"{100 * balance:.1f}", "% of bytes"),
            (f"{tier}: latency", f"{link.latency * 1e6:.2f}", "us"),
            (f"{tier}: smallest full window", f"{link.window_floor / 1e6:.2f}", "MB"),
            (f"{tier}: window that HBM bears", f"{link.window_knee / 1e6:.2f}", "MB"),
            (f"{tier}: HBM lost per byte copied", f"{link.copy_interference:.2f}", "bytes"),
        ]
    return found
