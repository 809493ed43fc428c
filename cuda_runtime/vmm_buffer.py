"""A tiered buffer in GPU memory, and the pages that are made ahead of its moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dak_inductor.cuda_runtime.exported import bytes_tensor
from dak_inductor.cuda_runtime.file_bytes import FileBytes
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.errors import (
    CheckpointError,
    DeviceMemoryError,
    DriverError,
    HostMemoryError,
    TierError,
)

if TYPE_CHECKING:
    from dak_inductor.cuda_runtime.vmm import VmmTier

_LARGE_ALLOCATION_BYTES = 32 << 20  # LARGE_HANDLE_PAGES of tier.h


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
        self._note_committed()

    def physical_bytes(self) -> TierBytes:
        return TierBytes(*self._memory.physical_bytes())

    def growth(self, committed: int) -> TierBytes:
        return TierBytes(*self._memory.growth(self._pages(committed)))

    def next_ahead(self, committed: int) -> int:
        return int(self._memory.next_ahead(self._pages(committed)))

    def make_ahead(self, committed: int) -> int:
        self.check_usable()
        return int(self._memory.make_ahead(self._pages(committed)))

    def drop_ahead(self) -> None:
        self._memory.drop_ahead()

    @property
    def ahead(self) -> int:
        return self._bytes_of(int(self._memory.ahead_pages()))

    def ahead_bytes(self) -> int:
        return int(self._memory.ahead_bytes())

    def _grow(self, committed: int) -> int:
        self._prepared_split = None
        self._memory.grow(self._pages(committed))
        self._note_committed()
        return self.committed

    def _pages(self, committed: int) -> int:
        """Pages that hold the first `committed` bytes."""
        return -(-(self.start_offset + committed) // self.page_bytes) if committed else 0

    def _bytes_of(self, pages: int) -> int:
        """Bytes of the tensor that lie in the first `pages` pages."""
        return max(0, min(self.nbytes, pages * self.page_bytes - self.start_offset))

    def _note_committed(self) -> None:
        self.committed = self._bytes_of(int(self._memory.committed_pages()))

    def _move(self, split: int) -> None:
        if split != self._prepared_split:
            self._check_move(split)
        self._prepared_split = None
        self.last_move = self._memory.move(self._residency(split))

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

    def write_file(self, source: FileBytes, offset_bytes: int = 0) -> bool:
        self.check_usable()
        self._wait_for_readers()
        try:
            self._memory.write_file(source.descriptor, source.position, source.nbytes, offset_bytes)
        except CheckpointError as error:
            raise CheckpointError(f"{source.name}: {error}") from error
        return True

    def _fill(self, source: torch.Tensor, offset_bytes: int) -> None:
        self._memory.write(source.data_ptr(), source.nbytes, offset_bytes)

    def _remote_bytes(self) -> torch.Tensor:
        self.check_usable()
        if not self._tier.remote_is_host:
            raise TierError(f"the remote part lies on {self.tier}, where the CPU cannot read it")
        nbytes = self.committed - self.split
        if nbytes <= 0:
            return torch.empty(0, dtype=torch.uint8)
        window, address = self._memory.open_for_cpu(self.split, self.committed)
        return bytes_tensor(window, address, nbytes, torch.device("cpu"))

    def _residency(self, split: int) -> bytes:
        """One byte per page, 1 where it is remote when the split is `split`."""
        local = self.local_pages(split)
        return bytes(local) + b"\1" * (self.page_count - local)

    def _check_move(self, split: int) -> None:
        held = self._pages(self.committed)
        pages = min(held, self.local_pages(split)) - min(held, self.local_pages(self.split))
        more = TierBytes(max(0, pages) * self.page_bytes, max(0, -pages) * self.page_bytes)
        try:
            self._tier.check_room(more, f"moving the split of {self.label or 'a tensor'}")
        except (DeviceMemoryError, HostMemoryError, DriverError) as error:
            raise self._stays(error) from error


@dataclass(frozen=True, slots=True)
class PendingPages:
    """Pages in the making for a move."""

    buffer: VmmBuffer

    def wait(self) -> None:
        """Return when they are there. A failure to make them is reported by the move."""
        self.buffer._memory.finish_preparation()
