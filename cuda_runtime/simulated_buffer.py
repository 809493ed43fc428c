"""The buffer of the simulated tier: which of its pages are "local", held, and made ahead."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import numpy as np
import torch

from dak_inductor.cuda_runtime.exported import as_bytes
from dak_inductor.cuda_runtime.memory_lock import MEMORY_LOCK
from dak_inductor.cuda_runtime.tier import start_offset
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.errors import DeviceMemoryError, HostMemoryError

if TYPE_CHECKING:
    from dak_inductor.cuda_runtime.simulated import SimulatedCounters, SimulatedTier


class _Memory:
    """One aligned CPU allocation. Tensors hold it through numpy, and with it the buffer."""

    def __init__(self, block: np.ndarray, start: int, nbytes: int, owner: SimulatedBuffer) -> None:
        self.owner = owner
        self.block = block
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (max(nbytes, 1),),
            "data": (start, False),
        }


class SimulatedBuffer(TieredBuffer):
    """A tiered buffer whose pages all are CPU memory. Made by `SimulatedTier.allocate`.

    One that is `growing` starts without pages: zeros that the kernel has not made pages of yet.
    """

    def __init__(
        self, tier: SimulatedTier, nbytes: int, split: int, pages: int, *, growing: bool = False
    ) -> None:
        make = np.zeros if growing else np.empty
        try:
            block = make((pages + 1) * tier.page_bytes, dtype=np.uint8)
        except MemoryError as error:
            raise HostMemoryError(
                f"this machine gives no range of {pages * tier.page_bytes} bytes, in which the "
                "simulated tier keeps a tensor. Ask for less, or for fewer tokens of a KV cache"
            ) from error
        base = -(-block.ctypes.data // tier.page_bytes) * tier.page_bytes
        super().__init__(
            nbytes=nbytes,
            page_bytes=tier.page_bytes,
            address=base + start_offset(split, nbytes, tier.page_bytes),
            device=torch.device("cpu"),
            tier=tier.name,
            split=split,
        )
        self._tier = tier
        self._block = block
        self._page_is_local = np.zeros(pages, dtype=bool)
        self._page_is_local[: self.local_pages(split)] = True
        self._page_is_held = np.full(pages, not growing)  # those made ahead too
        self._page_is_ahead = np.zeros(pages, dtype=bool)
        if growing:
            self.committed = 0
        tier.counters.hold(self.physical_bytes())
        weakref.finalize(
            self,
            _release,
            tier.counters,
            self._page_is_local,
            self._page_is_held,
            tier.page_bytes,
        )

    def physical_bytes(self) -> TierBytes:
        return _held(self._page_is_local, self._page_is_held, self.page_bytes)

    def growth(self, committed: int) -> TierBytes:
        new = self._new_pages(committed)
        return _held(self._page_is_local, new, self.page_bytes)

    def next_ahead(self, committed: int) -> int:
        return self.page_bytes if (self._new_pages(committed) & ~self._page_is_local).any() else 0

    def make_ahead(self, committed: int) -> int:
        with MEMORY_LOCK:
            pages = np.flatnonzero(self._new_pages(committed) & ~self._page_is_local)
            if not len(pages):
                return 0
            if self._tier.due("ahead"):
                raise HostMemoryError("injected failure: a page was not made ahead")
            self._page_is_held[pages[0]] = self._page_is_ahead[pages[0]] = True
            self._tier.counters.hold(TierBytes(remote=self.page_bytes))
            return self.page_bytes

    def drop_ahead(self) -> None:
        with MEMORY_LOCK:
            self._tier.counters.hold(TierBytes(remote=-self.ahead_bytes()))
            self._page_is_held &= ~self._page_is_ahead
            self._page_is_ahead[:] = False

    @property
    def ahead(self) -> int:
        pages = np.flatnonzero(self._page_is_ahead)
        end = (int(pages[-1]) + 1) * self.page_bytes - self.start_offset if len(pages) else 0
        return min(self.nbytes, max(self.committed, end))

    def ahead_bytes(self) -> int:
        return int(self._page_is_ahead.sum()) * self.page_bytes

    def _grow(self, committed: int) -> int:
        if self._tier.due("page"):
            raise HostMemoryError(f"injected failure: {committed} bytes were not committed")
        with MEMORY_LOCK:
            new = self._new_pages(committed)
            self._tier.counters.hold(_held(self._page_is_local, new, self.page_bytes))
            self._page_is_held |= new
            self._page_is_ahead[: self._page_count_of(committed)] = False
        return self._page_end(committed)

    def _new_pages(self, committed: int) -> np.ndarray:
        """True for each page that `grow(committed)` would make."""
        pages = self._page_count_of(committed)
        return (np.arange(len(self._page_is_held)) < pages) & ~self._page_is_held

    def _page_count_of(self, committed: int) -> int:
        return -(-(self.start_offset + committed) // self.page_bytes) if committed else 0

    def _move(self, split: int) -> None:
        self.drop_ahead()  # made for the old residency
        before, after = self.local_pages(self.split), self.local_pages(split)
        pages = range(before, after) if after > before else range(before - 1, after - 1, -1)
        held = int(self._page_is_held[min(before, after) : max(before, after)].sum())
        self._check_room(held if after > before else -held)
        for moved, page in enumerate(pages):
            if self._tier.due("page"):
                self._flip(pages[:moved])
                raise self._stays(RuntimeError(f"injected failure at page {page}"))
            self._flip(pages[moved : moved + 1])
        self._tier.counters.bytes_moved += held * self.page_bytes

    def _fill(self, source: torch.Tensor, offset_bytes: int) -> None:
        if self._tier.due("write"):
            raise HostMemoryError(f"injected failure: {source.nbytes} bytes were not written")
        self._bytes()[offset_bytes : offset_bytes + source.nbytes].copy_(as_bytes(source))

    def _bytes(self) -> torch.Tensor:
        memory = _Memory(self._block, self.address, self.nbytes, self)
        return torch.from_numpy(np.asarray(memory))[: self.nbytes]

    def _remote_bytes(self) -> torch.Tensor:
        return self._bytes()[self.split : self.nbytes]

    def _flip(self, pages: range) -> None:
        for page in pages:
            to_local = not self._page_is_local[page]
            self._page_is_local[page] = to_local
            if self._page_is_held[page]:
                change = self.page_bytes if to_local else -self.page_bytes
                self._tier.counters.hold(TierBytes(change, -change))

    def _check_room(self, more_local_pages: int) -> None:
        """MoveError if the pages of a move do not fit where they go."""
        more = more_local_pages * self.page_bytes
        try:
            if more > 0:
                self._tier.check_local(more)
            elif self._tier.host_memory is not None:
                self._tier.check_host(-more, "a move to the simulated tier")
        except (DeviceMemoryError, HostMemoryError) as error:
            raise self._stays(error) from error


def _held(local: np.ndarray, which: np.ndarray, page_bytes: int) -> TierBytes:
    """Bytes of the pages in the mask `which`, by tier."""
    near = int((local & which).sum())
    return TierBytes(near * page_bytes, (int(which.sum()) - near) * page_bytes)


def _release(
    counters: SimulatedCounters, local: np.ndarray, held: np.ndarray, page_bytes: int
) -> None:
    pages = _held(local, held, page_bytes)
    counters.hold(TierBytes(-pages.local, -pages.remote))
