"""One tensor, one address, two memories: the interface that every tier implements.

A tiered buffer is one contiguous address range. Its first `split` bytes live in the local tier
(HBM), the rest in the remote one. Residency is kept by page; the range starts off a page boundary,
so that the split asked for at creation lands on one. Moves of a live buffer go by whole pages.
"""

from __future__ import annotations

import abc
import os
from typing import Any, Protocol

import torch

from dak_inductor.cuda_runtime.exported import as_bytes, bytes_tensor, check_source, shaped
from dak_inductor.cuda_runtime.file_bytes import FileBytes
from dak_inductor.cuda_runtime.remote_view import RemoteView
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.errors import MoveError, TieredTensorError, TierError


class SplitRecord(Protocol):
    """Where a buffer's split is kept for kernels to read, and what was read of it is counted
    (`device_records`)."""

    address: int

    def publish(self, split: int) -> None: ...

    def count_call(self, read: TierBytes) -> None: ...


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
        label: name of the weight it holds, for plans and messages; "" until its owner sets it.
        usable: False in a forked child for memory that does not survive a fork.
        record: where kernels read its split; None for memory that no kernel of ours reads.
        committed: bytes [0, committed) have memory of their own; `nbytes`, but for a buffer that
            grows (`Tier.allocate_growing`). The rest reads as zeros and must not be written.
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
        self._split = split
        self.committed = nbytes
        self.generation = 0
        self.usable = True
        self.transient_bytes = 0
        self.label = ""
        self.record: SplitRecord | None = None

    @property
    def split(self) -> int:
        return self._split

    @split.setter
    def split(self, split: int) -> None:
        """Every change of residency ends here, so that no kernel reads an old split."""
        self._split = split
        if self.record is not None:
            self.record.publish(split)

    @property
    def device_record(self) -> int:
        """Device address of the record that kernels read the split from; 0 where there is none."""
        return self.record.address if self.record is not None else 0

    @property
    def start_offset(self) -> int:
        """Bytes from the start of the first page to byte 0."""
        return self.address % self.page_bytes

    @property
    def page_count(self) -> int:
        return -(-(self.start_offset + self.nbytes) // self.page_bytes)

    def bytes_by_tier(self) -> TierBytes:
        """Bytes of the tensor range by tier; their sum is `committed`."""
        return self.bytes_in(0, self.committed)

    def local_pages(self, split: int) -> int:
        """Pages that are local when the split is `split` (one that `nearest_split` returns)."""
        if split <= 0:
            return 0
        if split >= self.nbytes:
            return self.page_count
        return (self.start_offset + split) // self.page_bytes

    def physical_bytes(self) -> TierBytes:
        """Bytes of the pages held, those made ahead too, by tier; at least `bytes_by_tier()`."""
        return self._all_pages()

    def claimed_bytes(self) -> TierBytes:
        """Bytes of the pages that it holds once all of it is committed, by tier."""
        return self.physical_bytes() if self.committed == self.nbytes else self._all_pages()

    def _all_pages(self) -> TierBytes:
        local = self.local_pages(self.split)
        return TierBytes(local * self.page_bytes, (self.page_count - local) * self.page_bytes)

    def bytes_in(self, start: int, stop: int) -> TierBytes:
        """Bytes of [start, stop) by tier, clamped to what is committed."""
        start, stop = max(0, start), min(stop, self.committed)
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

    def move(self, split: int) -> int:
        """Move the split to `nearest_split(split)`, keeping address and contents; returns it.

        The caller guarantees that no work on the range is in flight and no capture is open. Raises
        MoveError, after which the old state stands.
        """
        self.check_usable()
        split = self.nearest_split(split)
        if split != self.split:
            self._move(split)
            self.split = split
            self.generation += 1
        return split

    def growth(self, committed: int) -> TierBytes:
        """Bytes of the pages that `grow(committed)` would make, by tier: not those made ahead."""
        return TierBytes()

    def next_ahead(self, committed: int) -> int:
        """Bytes that `make_ahead(committed)` would make; 0 where there is nothing left to make."""
        return 0

    def make_ahead(self, committed: int) -> int:
        """Make one allocation of the remote pages that `grow(committed)` will need; its bytes.

        Any thread may call it while work is in flight, captures too. The caller guarantees that it
        fits (`Tier.has_room`). Raises HostMemoryError, DeviceMemoryError, DriverError.
        """
        return 0

    def drop_ahead(self) -> None:
        """Give back what `make_ahead` has made and `grow` has not taken."""
        return

    @property
    def ahead(self) -> int:
        """`grow` up to here makes no remote page; at least `committed`."""
        return self.committed

    def ahead_bytes(self) -> int:
        """Bytes of the pages that `make_ahead` has made and `grow` has not taken."""
        return 0

    def grow(self, committed: int) -> int:
        """Give at least bytes [0, committed) memory of their own, zeroed; returns what is then
        committed: `committed` rounded up to whole pages, or `nbytes`.

        Up to the split that memory is local, behind it remote. The caller guarantees what `move`
        wants of him, and that the memory fits (`Tier.check_growth`). Raises HostMemoryError,
        DeviceMemoryError or MoveError, after which the old state stands.
        """
        self.check_usable()
        if committed > self.nbytes:
            raise TierError(f"{committed} bytes cannot be committed of a buffer of {self.nbytes}")
        if committed > self.committed:
            self.committed = self._grow(committed)
            self.generation += 1
        return self.committed

    def prepare_move(self, split: int) -> Any:
        """Start making the pages that a move to `split` needs, so that the move itself is short.

        Returns None, or an object whose `wait()` returns when they are there. Raises MoveError.
        """
        return None

    def cancel_move(self) -> None:
        """Give back what `prepare_move` has made, if no move has taken it."""
        return

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
        self.check_usable()
        return shaped(self._bytes(), dtype, shape, stride, offset_bytes)

    def write(self, source: torch.Tensor, offset_bytes: int = 0) -> None:
        """Copy a contiguous CPU or CUDA tensor's bytes to [offset_bytes, ...), synchronously."""
        self.check_usable()
        check_source(source, offset_bytes, self.nbytes)
        on_cpu = source.device.type == "cpu"
        if not on_cpu:
            target = self._bytes()[offset_bytes : offset_bytes + source.nbytes]
            target.copy_(as_bytes(source))
        self._wait_for_readers()
        if on_cpu:
            self._fill(source, offset_bytes)

    def write_file(self, source: FileBytes, offset_bytes: int = 0) -> bool:
        """Copy bytes of a file to [offset_bytes, ...), synchronously.

        False, with nothing done, for memory that takes tensors only. Raises CheckpointError.
        """
        return False

    def _bytes(self) -> torch.Tensor:
        """uint8 tensor over the whole range; holds the buffer, as does everything made from it."""
        return bytes_tensor(self, self.address, self.nbytes, self.device)

    def _wait_for_readers(self) -> None:
        """Kernels queued before may still read what is overwritten next."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _move(self, split: int) -> None:
        """Give the pages between the split and `split` the other memory. Raises MoveError."""
        raise MoveError(f"a buffer of tier {self.tier!r} stays where it was put")

    def _grow(self, committed: int) -> int:
        """`grow` beyond what is committed; returns the new `committed`."""
        raise MoveError(f"a buffer of tier {self.tier!r} is committed from the start")

    def _page_end(self, committed: int) -> int:
        """The end of the page that holds the last of `committed` bytes, `nbytes` at most."""
        pages = -(-(self.start_offset + committed) // self.page_bytes)
        return min(self.nbytes, pages * self.page_bytes - self.start_offset)

    def _stays(self, error: Exception) -> MoveError:
        """The error of a move that `error` prevents."""
        return MoveError(f"the split stays at {self.split} of {self.nbytes} bytes: {error}")

    @abc.abstractmethod
    def _fill(self, source: torch.Tensor, offset_bytes: int) -> None:
        """`write` for a CPU source that has been checked."""

    @abc.abstractmethod
    def _remote_bytes(self) -> torch.Tensor:
        """uint8 CPU tensor over [split, nbytes)."""
