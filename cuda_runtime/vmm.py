"""Tiers in GPU memory: one address range, backed page by page by HBM or by the remote tier."""

from __future__ import annotations

import atexit
import functools
import logging
import sys
from collections.abc import Generator, Sequence
from typing import Any

import torch

from dak_inductor.cuda_runtime import address_table, device_records
from dak_inductor.cuda_runtime.checked_room import AT_ONCE, CheckedRoom
from dak_inductor.cuda_runtime.host_memory import available_host_memory, check_host_memory
from dak_inductor.cuda_runtime.memory_lock import MEMORY_LOCK
from dak_inductor.cuda_runtime.nvrtc import extension
from dak_inductor.cuda_runtime.page_maker import PAGE_MAKER
from dak_inductor.cuda_runtime.page_pipeline import PagePipeline, PageStages
from dak_inductor.cuda_runtime.probe_support import host_page_support
from dak_inductor.cuda_runtime.registered import RegisteredTier
from dak_inductor.cuda_runtime.tier import Tier, creation_split
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.cuda_runtime.vmm_buffer import VmmBuffer
from dak_inductor.errors import (
    DeviceMemoryError,
    HostMemoryError,
)

log = logging.getLogger(__name__)

PREPARED_AHEAD_BYTES = 3 << 29
"""The most host memory that is prepared and not owned by a tensor yet."""

_STREAMS_IN_POOL = 32
_EXIT_SECONDS = 5.0


def open_device_tier(
    remote: str, *, device: torch.device, host_memory: int | None = None
) -> VmmTier | RegisteredTier:
    """The tier "cpu" or "cuda:N" of a CUDA device.

    Where the system refuses host pages it is a RegisteredTier, and a warning says why. Raises
    UnsupportedDriverError without a driver or the extension, TierError for an unreachable peer.
    """
    extension().library()  # without a driver, say that and nothing else
    if remote == "cpu":
        support = host_page_support(device.index or 0)
        if not support.usable:
            log.warning(
                "this system refuses host memory pages (%s): tensors go to registered host "
                "memory instead, each whole on one side, and stay where they are put",
                support.reason,
            )
            return RegisteredTier(device, host_memory)
        return VmmTier(remote, device, host_memory, by_node=support.by_node)
    return VmmTier(remote, device, host_memory)


def memory_in_use() -> dict[str, int]:
    """Bytes of physical memory this process holds through its tiers, by place.

    "cuda:N" and "cpu" (prepared pages included); "staging" is pinned memory for copies, "records"
    is device memory for `device_records`, "imported" are other processes' pages.
    """
    return dict(extension().memory_in_use())


def live_handles() -> int:
    """Physical allocations this process holds. 0 once all buffers, tensors and pools are gone."""
    return int(extension().live_handles())


def drain(seconds: float = 10.0) -> bool:
    """Wait until what was given up is free; False if that took longer than `seconds`."""
    return bool(extension().drain(seconds))


class VmmTier(Tier):
    """Pages of HBM and of host DRAM or a peer's HBM, 2 MiB each.

    Args:
        remote: "cpu" or "cuda:N".
        device: the GPU whose kernels use the tensors.
        host_memory: bytes of host memory the process may hold in tiers; None: what there is.
        by_node: CPU access is granted by NUMA node (`host_page_support`).
    """

    def __init__(
        self, remote: str, device: torch.device, host_memory: int | None, *, by_node: bool = True
    ) -> None:
        self.name = remote
        self.device = device
        self.host_memory = host_memory
        self.makes_ahead = remote == "cpu"  # pages of a GPU are made in 10 us
        peer = -1 if remote == "cpu" else int(remote.removeprefix("cuda:"))
        self._tier = _native_tier(device.index or 0, peer, by_node)
        self.page_bytes = int(self._tier.page_bytes)
        self.exported_device = torch.device("cpu") if extension().is_fake() else device

    @property
    def remote_is_host(self) -> bool:
        return self.name == "cpu"

    def allocate(self, nbytes: int, *, split: int) -> VmmBuffer:
        with MEMORY_LOCK:
            self._check_buffer(nbytes, split)
            memory = self._tier.allocate(nbytes, creation_split(split, nbytes))
        return self._entered(memory, split)

    def allocate_each(
        self, requests: Sequence[tuple[int, int]]
    ) -> Generator[TieredBuffer, None, None]:
        """One thread makes pages and one maps them, ahead of the caller who fills them.

        Up to PREPARED_AHEAD_BYTES ahead where all requests fit beside what is there now; else by
        one buffer, since what the next waits for is released as the caller goes on.
        """
        held = [self.held_bytes(nbytes, split) for nbytes, split in requests]
        ahead = PREPARED_AHEAD_BYTES if self._fits(sum(held, TierBytes())) else 0
        room = CheckedRoom(self, AT_ONCE if ahead else 0)
        stages = PageStages(
            lambda nbytes, split: self._made(nbytes, split, room),
            self._mapped,
            lambda nbytes, split: self.allocate(nbytes, split=split),
        )
        yield from PagePipeline(stages, requests, ahead_bytes=ahead).buffers()

    def allocate_growing(self, nbytes: int, *, split: int) -> VmmBuffer:
        memory = self._tier.allocate_growing(nbytes, creation_split(split, nbytes))
        return self._entered(memory, split)

    def check_growth(self, more: TierBytes, what: str) -> None:
        self.check_room(more, what)

    def _made(self, nbytes: int, split: int, room: CheckedRoom) -> Any:
        """The pages of a new buffer, not mapped yet."""
        with MEMORY_LOCK:
            room.need(self.held_bytes(nbytes, split), f"a tensor of {nbytes} bytes")
            return self._tier.make(nbytes, creation_split(split, nbytes))

    def _mapped(self, memory: Any, split: int) -> VmmBuffer:
        memory.map()
        return self._entered(memory, split)

    def _entered(self, memory: Any, split: int) -> VmmBuffer:
        """A buffer on pages that are mapped, where kernels and lookups find it."""
        buffer = VmmBuffer(self, memory, creation_split(split, int(memory.nbytes)))
        device_records.attach(buffer)
        address_table.register(buffer)
        return buffer

    def _check_buffer(self, nbytes: int, split: int) -> None:
        self.check_room(self.held_bytes(nbytes, split), f"a tensor of {nbytes} bytes")

    def _fits(self, more: TierBytes) -> bool:
        try:
            self.check_room(more, "all tensors together")
        except (DeviceMemoryError, HostMemoryError):
            return False
        return True

    def reserve(
        self, remote_bytes: int, *, peak_bytes: int | None = None, prepare: bool = True
    ) -> None:
        peak = remote_bytes if peak_bytes is None else peak_bytes
        if not self.remote_is_host:
            _check_device(int(self.name.removeprefix("cuda:")), peak, "offloading")
            return
        self._check_host(peak, f"offloading {remote_bytes / 1e9:.2f} GB to host memory")
        if not prepare:
            return
        room = available_host_memory() if self.host_memory is None else self.host_memory
        # Where originals are released as tensors move, pages made ahead may not fit beside them.
        ahead = peak >= remote_bytes or room >= peak + PREPARED_AHEAD_BYTES
        self._tier.reserve(remote_bytes if ahead else 0)

    def trim(self) -> None:
        """Give back prepared pages that no tensor has taken, and the blocks that copies used."""
        self._tier.reserve(0)
        extension().release_staging()

    def prepared_bytes(self) -> int:
        """Bytes of prepared host pages that no tensor has taken yet."""
        return int(self._tier.prepared_bytes())

    def check_room(self, more: TierBytes, what: str) -> None:
        """Raise HostMemoryError or DeviceMemoryError unless this many bytes of pages fit."""
        _check_device(self.device.index or 0, more.local, what)
        if self.remote_is_host:
            self._check_host(more.remote, what)
        else:
            _check_device(int(self.name.removeprefix("cuda:")), more.remote, what)

    def has_room(self, more: TierBytes) -> bool:
        free, _ = extension().memory_info(self.device.index or 0)
        if more.local > free or not more.remote:
            return more.local <= free
        if not self.remote_is_host:
            return more.remote <= extension().memory_info(int(self.name.removeprefix("cuda:")))[0]
        if self.host_memory is None:
            return more.remote <= available_host_memory()
        return more.remote + memory_in_use().get("cpu", 0) <= self.host_memory

    def capture_is_open(self) -> bool:
        return bool(extension().capture_is_open())

    def _check_host(self, more: int, what: str) -> None:
        if more <= 0:
            return
        try:
            self._check_host_now(more, what)
        except HostMemoryError:
            PAGE_MAKER.give_back()
            drain()
            self._check_host_now(more, what)

    def _check_host_now(self, more: int, what: str) -> None:
        prepared = self.prepared_bytes()
        if self.host_memory is None:
            check_host_memory(max(0, more - prepared), None, what)
            return
        taken = memory_in_use().get("cpu", 0) - prepared
        if more + taken > self.host_memory:
            drain()  # what has been given up does not count
            taken = memory_in_use().get("cpu", 0) - prepared
        check_host_memory(more, self.host_memory, what, taken=taken)


_native_tiers: dict[tuple[int, int, bool], Any] = {}


def _native_tier(device: int, peer: int, by_node: bool) -> Any:
    """One per pair of memories and process, so that its prepared pages serve every model."""
    driver = extension()
    if not driver.is_fake():
        _watch_captures()
        torch.cuda.init()
    key = (device, peer, by_node)
    if key not in _native_tiers:
        _native_tiers[key] = driver.Tier(device, peer, by_node)
    return _native_tiers[key]


@functools.cache
def _watch_captures() -> None:
    """Tell the reaper all streams on which torch captures graphs: those of its own pools."""
    streams = {
        torch.cuda.Stream(device, priority=priority).cuda_stream
        for device in range(torch.cuda.device_count())
        for priority in (0, -1)
        for _ in range(_STREAMS_IN_POOL)
    }
    extension().watch_streams(list(streams))


def _check_device(device: int, more: int, what: str) -> None:
    """Raise DeviceMemoryError unless `more` bytes fit, after giving back what torch only caches."""
    if more <= 0:
        return
    driver = extension()
    free, total = driver.memory_info(device)
    if more > free:
        driver.drain(10.0)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        free, total = driver.memory_info(device)
    if more > free:
        raise DeviceMemoryError(
            f"{what} needs {more} bytes ({more / 1e9:.2f} GB) on cuda:{device}; {free / 1e9:.2f} "
            f"of {total / 1e9:.2f} GB are free. Nothing was allocated. Lower gpu_memory by "
            f"{(more - free) / 1e9:.2f} GB, or free GPU memory."
        )


@atexit.register
def _at_exit() -> None:
    """Free what is queued while the driver is there; what lives on goes with the process."""
    driver = sys.modules.get("dak_inductor.cuda_runtime._driver")
    if driver is None or not driver.is_open() or driver.in_forked_child():
        return
    PAGE_MAKER.stop()
    for tier in _native_tiers.values():
        tier.stop()
    driver.shutdown(_EXIT_SECONDS)
