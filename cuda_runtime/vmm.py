"""Tiers in GPU memory: one address range, backed page by page by HBM or by the remote tier."""

from __future__ import annotations

import atexit
import functools
import logging
import sys
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.exported import as_bytes, bytes_tensor, check_source, shaped
from dak_inductor.cuda_runtime.host_memory import available_host_memory, check_host_memory
from dak_inductor.cuda_runtime.nvrtc import extension
from dak_inductor.cuda_runtime.probe_support import host_page_support
from dak_inductor.cuda_runtime.registered import RegisteredTier
from dak_inductor.cuda_runtime.tier_buffer import Tier, TierBytes, TieredBuffer, creation_split
from dak_inductor.errors import (
    DeviceMemoryError,
    DriverError,
    HostMemoryError,
    MoveError,
    TierError,
)

log = logging.getLogger(__name__)

PREPARED_AHEAD_BYTES = 3 << 29
"""The most host memory that is prepared and not owned by a tensor yet."""

_LARGE_ALLOCATION_BYTES = 32 << 20  # LARGE_HANDLE_PAGES of tier.h
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

    "cuda:N" and "cpu" (prepared pages included); "staging" is pinned memory for copies, "imported"
    are other processes' pages.
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
        peer = -1 if remote == "cpu" else int(remote.removeprefix("cuda:"))
        self._tier = _native_tier(device.index or 0, peer, by_node)
        self.page_bytes = int(self._tier.page_bytes)
        self.exported_device = torch.device("cpu") if extension().is_fake() else device

    @property
    def remote_is_host(self) -> bool:
        return self.name == "cpu"

    def allocate(self, nbytes: int, *, split: int) -> VmmBuffer:
        split = creation_split(split, nbytes)
        held = self.held_bytes(nbytes, split)
        self.check_room(held, f"a tensor of {nbytes} bytes")
        buffer = VmmBuffer(self, self._tier.allocate(nbytes, split), split)
        address_table.register(buffer)
        return buffer

    def allocate_each(
        self, requests: Sequence[tuple[int, int]]
    ) -> Generator[TieredBuffer, None, None]:
        """One buffer ahead: making host pages takes longer than filling them (6.5 GB/s on H200)."""
        with ThreadPoolExecutor(1, thread_name_prefix="dak-pages") as maker:
            ahead: Future[TieredBuffer] | None = None
            try:
                for position, (nbytes, split) in enumerate(requests):
                    buffer = self._made_ahead(ahead) or self.allocate(nbytes, split=split)
                    ahead = None
                    if position + 1 < len(requests):
                        following, local = requests[position + 1]
                        ahead = maker.submit(self.allocate, following, split=local)
                    yield buffer
                    del buffer
            finally:
                if ahead is not None:
                    self._made_ahead(ahead)

    @staticmethod
    def _made_ahead(ahead: Future[TieredBuffer] | None) -> TieredBuffer | None:
        """None where it did not fit yet: what it waits for may be released by now."""
        try:
            return ahead.result() if ahead is not None else None
        except (DeviceMemoryError, HostMemoryError):
            return None

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

    def _check_host(self, more: int, what: str) -> None:
        if more <= 0:
            return
        prepared = self.prepared_bytes()
        if self.host_memory is None:
            check_host_memory(max(0, more - prepared), None, what)
            return
        taken = memory_in_use().get("cpu", 0) - prepared
        if more + taken > self.host_memory:
            drain()  # what has been given up does not count
            taken = memory_in_use().get("cpu", 0) - prepared
        check_host_memory(more, self.host_memory, what, taken=taken)


class VmmBuffer(TieredBuffer):
    """A tiered buffer in GPU memory. Made by `VmmTier.allocate`.

    `last_move` holds the times of the last move (seconds by phase, bytes copied), None before it.
    """

    def __init__(self, tier: VmmTier, memory: Any, split: int) -> None:
        super().__init__(
            nbytes=int(memory.nbytes),
            page_bytes=tier.page_bytes,
            address=int(memory.address),
            device=tier.exported_device,
            tier=tier.name,
            split=split,
        )
        self.last_move: Any = None
        # What stays local of a large allocation that the split cuts is copied out of it first.
        self.transient_bytes = _LARGE_ALLOCATION_BYTES
        self._tier = tier
        self._memory = memory
        self._prepared_split: int | None = None

    def physical_bytes(self) -> TierBytes:
        return TierBytes(*self._memory.physical_bytes())

    def move(self, split: int) -> int:
        self.check_usable()
        split = self.nearest_split(split)
        if split == self.split:
            return split
        if split != self._prepared_split:
            self._check_move(split)
        self._prepared_split = None
        self.last_move = self._memory.move(self._residency(split))
        self.split = split
        self.generation += 1
        return split

    def prepare_move(self, split: int) -> PendingPages:
        """Start making the pages that a move to `split` needs, so that the move itself is short.

        The next move takes them; a move elsewhere, or `cancel_move`, gives them back. Until then
        both the old and the new pages are held. Raises MoveError where they would not fit.
        """
        self.check_usable()
        split = self.nearest_split(split)
        self._check_move(split)
        self._memory.prepare(self._residency(split))
        self._prepared_split = split
        return PendingPages(self)

    def cancel_move(self) -> None:
        """Give back pages made by `prepare_move`."""
        self._prepared_split = None
        self._memory.cancel_preparation()

    def tensor(
        self,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        stride: tuple[int, ...] | None = None,
        offset_bytes: int = 0,
    ) -> torch.Tensor:
        self.check_usable()
        return shaped(self._bytes(), dtype, shape, stride, offset_bytes)

    def write(self, source: torch.Tensor, offset_bytes: int = 0) -> None:
        self.check_usable()
        check_source(source, offset_bytes, self.nbytes)
        if source.device.type != "cpu":
            target = self._bytes()[offset_bytes : offset_bytes + source.nbytes]
            target.copy_(as_bytes(source))
            torch.cuda.current_stream(self.device).synchronize()
            return
        if self.device.type == "cuda":  # kernels queued before may still read what is overwritten
            torch.cuda.current_stream(self.device).synchronize()
        self._memory.write(source.data_ptr(), source.nbytes, offset_bytes)

    def _bytes(self) -> torch.Tensor:
        return bytes_tensor(self, self.address, self.nbytes, self.device)

    def _remote_bytes(self) -> torch.Tensor:
        self.check_usable()
        if not self._tier.remote_is_host:
            raise TierError(f"the remote part lies on {self.tier}, where the CPU cannot read it")
        nbytes = self.nbytes - self.split
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        window, address = self._memory.open_for_cpu(self.split, self.nbytes)
        return bytes_tensor(window, address, nbytes, torch.device("cpu"))

    def _residency(self, split: int) -> bytes:
        """One byte per page, 1 where it is remote when the split is `split`."""
        local = self.local_pages(split)
        return bytes(local) + b"\1" * (self.page_count - local)

    def _check_move(self, split: int) -> None:
        pages = self.local_pages(split) - self.local_pages(self.split)
        more = TierBytes(max(0, pages) * self.page_bytes, max(0, -pages) * self.page_bytes)
        try:
            self._tier.check_room(more, f"moving the split of {self.label or 'a tensor'}")
        except (DeviceMemoryError, HostMemoryError, DriverError) as error:
            raise MoveError(
                f"the split stays at {self.split} of {self.nbytes} bytes: {error}"
            ) from error


@dataclass(frozen=True, slots=True)
class PendingPages:
    """Pages in the making for a move."""

    buffer: VmmBuffer

    def wait(self) -> None:
        """Return when they are there. A failure to make them is reported by the move."""
        self.buffer._memory.finish_preparation()


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
    for tier in _native_tiers.values():
        tier.stop()
    driver.shutdown(_EXIT_SECONDS)
