"""One tensor, one address, two memories: the interface that every tier implements.

A tiered buffer is one contiguous address range. Its first `split` bytes live in the local tier
(HBM), the rest in the remote one. Residency is kept by page; the range starts off a page boundary,
so that the split asked for at creation lands on one. Moves of a live buffer go by whole pages.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dak_inductor.errors import StaleViewError, TieredTensorError

SPLIT_ALIGNMENT = 256
"""Splits at creation are free to this many bytes: the alignment torch wants of an address."""


@dataclass(frozen=True, slots=True)
class TierBytes:
    """Bytes by tier."""

    local: int = 0
    remote: int = 0

    def __add__(self, other: TierBytes) -> TierBytes:
        return TierBytes(self.local + other.local, self.remote + other.remote)

    @property
    def total(self) -> int:
        return self.local + self.remote

    @property
    def remote_share(self) -> float:
        """Share of the bytes that is remote, 0 for no bytes."""
        return self.remote / self.total if self.total else 0.0


def creation_split(split: int, nbytes: int) -> int:
    """The split a new buffer of `nbytes` gets when `split` bytes are asked to be local.

    Rounded down to 256 bytes, so never more local than asked; `nbytes` stays `nbytes`.
    """
    if split >= nbytes:
        return nbytes
    return max(0, split) // SPLIT_ALIGNMENT * SPLIT_ALIGNMENT


def start_offset(split: int, nbytes: int, page_bytes: int) -> int:
    """Bytes between the first page's start and byte 0 that put `split` on a page boundary."""
    return 0 if split >= nbytes else -split % page_bytes


class RemoteView:
    """A CPU view of the remote bytes [split, nbytes) of a buffer, valid until the next move."""

    def __init__(self, buffer: TieredBuffer) -> None:
        self.buffer = buffer
        self.generation = buffer.generation
        self.start = buffer.split

    def tensor(self) -> torch.Tensor:
        """uint8 CPU tensor over bytes [split, nbytes) of the buffer. Raises StaleViewError."""
        if self.buffer.generation != self.generation:
            raise StaleViewError(
                f"this view of remote bytes was made at generation {self.generation}, the "
                f"buffer is at {self.buffer.generation}: pages moved. Take a new remote_view()."
            )
        return self.buffer._remote_bytes()


class TieredBuffer(abc.ABC):
    """One address range in two memories, owned by its holder and every tensor exported from it.

    Attributes:
        nbytes: bytes of the range; byte 0 is the tensor's first byte, not the page's.
        page_bytes: granularity of moves.
        address: of byte 0; never changes.
        device: what exported tensors report, cuda:i, or cpu for the simulated tier.
        tier: "cpu", "cuda:N" or "simulated".
        generation: counts the moves that changed residency.
        split: bytes [0, split) are local, [split, nbytes) remote.
        transient_bytes: local bytes, at most, that a move or its preparation holds besides those
            that it starts and ends with.
        label: the name of the weight it holds, for reports; "" until its owner sets it.
        label: name of what it holds, for plans and messages; set by the owner.
        usable: False in a forked child for memory that does not survive a fork.
    """

    def __init__(
        self,
        *,
        nbytes: int,
        page_bytes: int,
        address: int,
        device: torch.device,
        tier: str,
        split: int,
    ) -> None:
        self.nbytes = nbytes
        self.page_bytes = page_bytes
        self.address = address
        self.device = device
        self.tier = tier
        self.split = split
        self.generation = 0
        self.usable = True
        self.label = ""
        self.transient_bytes = 0
        self.label = ""

    @property
    def start_offset(self) -> int:
        """Bytes from the start of the first page to byte 0."""
        return self.address % self.page_bytes

    @property
    def page_count(self) -> int:
        return -(-(self.start_offset + self.nbytes) // self.page_bytes)

    def bytes_by_tier(self) -> TierBytes:
        """Bytes of the tensor range by tier; their sum is `nbytes`."""
        return TierBytes(self.split, self.nbytes - self.split)

    def local_pages(self, split: int) -> int:
        """Pages that are local when the split is `split` (one that `nearest_split` returns)."""
        if split <= 0:
            return 0
        if split >= self.nbytes:
            return self.page_count
        return (self.start_offset + split) // self.page_bytes

    def physical_bytes(self) -> TierBytes:
        """Bytes of the pages held, by tier; at least `bytes_by_tier()`."""
        local = self.local_pages(self.split)
        return TierBytes(local * self.page_bytes, (self.page_count - local) * self.page_bytes)

    def bytes_in(self, start: int, stop: int) -> TierBytes:
        """Bytes of [start, stop) by tier, clamped to the range."""
        start, stop = max(0, start), min(stop, self.nbytes)
        if stop <= start:
            return TierBytes()
        local = min(max(self.split, start), stop) - start
        return TierBytes(local, stop - start - local)

    def nearest_split(self, split: int) -> int:
        """The split that a move to `split` would give: whole pages, never more local than asked."""
        if split >= self.nbytes:
            return self.nbytes
        if split == self.split:
            return split
        pages = (self.start_offset + max(0, split)) // self.page_bytes
        return max(0, pages * self.page_bytes - self.start_offset)

    def remote_view(self) -> RemoteView:
        """A CPU view of the remote part that notices a move."""
        self.check_usable()
        return RemoteView(self)

    def check_usable(self) -> None:
        """Raises TieredTensorError in a forked child whose parent owns the memory."""
        if not self.usable:
            raise TieredTensorError(
                f"a tiered tensor of {self.nbytes} bytes on {self.device} (tier {self.tier!r}) "
                f"was used in process {os.getpid()}, forked from the one that owns it: CUDA memory "
                "does not survive a fork. Start the process with the 'spawn' method and offload "
                "there, or keep offloaded models out of forked workers."
            )

    @abc.abstractmethod
    def move(self, split: int) -> int:
        """Move the split to `nearest_split(split)`, keeping address and contents; returns it.

        The caller guarantees that no work on the range is in flight and no capture is open. Raises
        MoveError, after which the old state stands.
        """

    def prepare_move(self, split: int) -> Any:
        """Start making the pages that a move to `split` needs, so that the move itself is short.

        Returns None, or an object whose `wait()` returns when they are there. Raises MoveError.
        """
        return None

    def cancel_move(self) -> None:
        """Give back what `prepare_move` has made, if no move has taken it."""
        return

    @abc.abstractmethod
    def tensor(
        self,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        stride: tuple[int, ...] | None = None,
        offset_bytes: int = 0,
    ) -> torch.Tensor:
        """A tensor on this memory (contiguous unless `stride`, in elements, is given).

        It keeps the buffer alive: memory is freed with the last tensor AND the buffer.
        """

    @abc.abstractmethod
    def write(self, source: torch.Tensor, offset_bytes: int = 0) -> None:
        """Copy a contiguous CPU or CUDA tensor's bytes to [offset_bytes, ...), synchronously."""

    @abc.abstractmethod
    def _remote_bytes(self) -> torch.Tensor:
        """uint8 CPU tensor over [split, nbytes)."""


class Tier(abc.ABC):
    """A remote tier of one device: where its buffers' remote pages come from.

    Attributes:
        name: "cpu", "cuda:N" or "simulated".
        page_bytes: granularity of moves.
        whole_tensors: True where a tensor is all local or all remote (registered host memory).
    """

    name: str
    page_bytes: int
    whole_tensors: bool = False

    def held_bytes(self, nbytes: int, split: int) -> TierBytes:
        """Pages, in bytes, that a new buffer of `nbytes` with `split` local bytes would hold."""
        split = creation_split(split, nbytes)
        offset = start_offset(split, nbytes, self.page_bytes)
        pages = -(-(offset + nbytes) // self.page_bytes)
        local = pages if split >= nbytes else (offset + split) // self.page_bytes
        return TierBytes(local * self.page_bytes, (pages - local) * self.page_bytes)

    @abc.abstractmethod
    def allocate(self, nbytes: int, *, split: int) -> TieredBuffer:
        """A buffer with `creation_split(split, nbytes)` local bytes, entered in the address table.

        Contents are undefined. Raises HostMemoryError or DeviceMemoryError before taking anything.
        """

    @abc.abstractmethod
    def reserve(
        self, remote_bytes: int, *, peak_bytes: int | None = None, prepare: bool = True
    ) -> None:
        """Announce that `remote_bytes` will be allocated: check capacity and start preparing pages.

        With `prepare=False` capacity is checked only. `peak_bytes` is the most host memory taken
        beyond today's at any moment, where originals are released while tensors move (default:
        `remote_bytes`). Raises HostMemoryError; takes nothing that a failure would leave behind.
        """

    def allocate_each(
        self, requests: Sequence[tuple[int, int]]
    ) -> Generator[TieredBuffer, None, None]:
        """A buffer for each (nbytes, split), in order; a tier may make the next one meanwhile.

        Raises what `allocate` raises, at the buffer concerned. Close the iterator to stop early.
        """
        for nbytes, split in requests:
            yield self.allocate(nbytes, split=split)

    def trim(self) -> None:
        """Give back what `reserve` has prepared and no buffer has taken."""
        return
