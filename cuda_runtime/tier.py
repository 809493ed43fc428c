"""What makes tiered buffers: the remote tier of one device."""

from __future__ import annotations

import abc
from collections.abc import Generator, Sequence

import torch

from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.tier_bytes import TierBytes

SPLIT_ALIGNMENT = 256
"""Splits at creation are free to this many bytes: the alignment torch wants of an address."""


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


class Tier(abc.ABC):
    """A remote tier of one device: where its buffers' remote pages come from.

    Attributes:
        name: "cpu", "cuda:N" or "simulated".
        page_bytes: granularity of moves.
        whole_tensors: True where a tensor is all local or all remote (registered host memory).
        makes_ahead: True where remote pages take long to make, and can be made before a buffer
            grows into them (`TieredBuffer.make_ahead`).
    """

    name: str
    page_bytes: int
    whole_tensors: bool = False
    makes_ahead: bool = False

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

    def allocate_growing(self, nbytes: int, *, split: int) -> TieredBuffer:
        """As `allocate`, but memory is taken as `TieredBuffer.grow` asks for it, and is zeroed.

        A tier that cannot do that commits all of it here.
        """
        buffer = self.allocate(nbytes, split=split)
        buffer.tensor(torch.uint8, (nbytes,)).zero_()
        return buffer

    def check_growth(self, more: TierBytes, what: str) -> None:
        """Raise HostMemoryError or DeviceMemoryError, with the arithmetic, unless `more` bytes of
        pages fit. `what` names the purpose, for the message. Takes nothing."""
        return

    def has_room(self, more: TierBytes) -> bool:
        """Whether `more` bytes of pages fit now: nothing is given back for them, and nothing waited
        for, so that a thread in the background may ask."""
        return True

    def capture_is_open(self) -> bool:
        """Whether a CUDA graph is being captured on a stream that torch captures on."""
        return False

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
