"""The fallback tier: registered host memory, where the driver refuses host pages of its own.

The address of a tensor cannot get other memory here. So a tensor is all in HBM or all in host
memory, from its allocation on: `nearest_split` gives the current split, and a move changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from dak_inductor.cuda_runtime import address_table, device_records
from dak_inductor.cuda_runtime.exported import bytes_tensor
from dak_inductor.cuda_runtime.host_memory import check_host_memory
from dak_inductor.cuda_runtime.nvrtc import extension
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.tier_bytes import TierBytes

KERNEL_PAGE_BYTES = 4096


class RegisteredTier(Tier):
    """Whole tensors in HBM, or in host memory registered with the driver (`cuMemHostRegister`)."""

    name = "cpu"
    page_bytes = KERNEL_PAGE_BYTES
    whole_tensors = True

    def __init__(self, device: torch.device, host_memory: int | None = None) -> None:
        self.device = device
        self.host_memory = host_memory
        self.exported_device = torch.device("cpu") if extension().is_fake() else device

    def held_bytes(self, nbytes: int, split: int) -> TierBytes:
        """Bytes held by a new buffer: all local if the whole tensor is to be, else all remote."""
        pages = -(-max(nbytes, 1) // KERNEL_PAGE_BYTES) * KERNEL_PAGE_BYTES
        return TierBytes(nbytes, 0) if split >= nbytes else TierBytes(0, pages)

    def allocate(self, nbytes: int, *, split: int) -> RegisteredBuffer:
        """A buffer all local if `split` is `nbytes`, else all remote (never more local than asked).

        Raises HostMemoryError before taking anything, DeviceMemoryError where HBM runs out.
        """
        remote = split < nbytes
        if remote:
            self._check(self.held_bytes(nbytes, 0).remote, f"a tensor of {nbytes} bytes")
        block = extension().RegisteredBlock(self.device.index or 0, nbytes, remote)
        buffer = RegisteredBuffer(self, block, nbytes, 0 if remote else nbytes)
        device_records.attach(buffer)
        address_table.register(buffer)
        return buffer

    def reserve(
        self, remote_bytes: int, *, peak_bytes: int | None = None, prepare: bool = True
    ) -> None:
        """Checks capacity only: registered memory is made fast enough on demand."""
        peak = remote_bytes if peak_bytes is None else peak_bytes
        self._check(peak, f"offloading {remote_bytes / 1e9:.2f} GB to host memory")

    def _check(self, more: int, what: str) -> None:
        taken = 0 if self.host_memory is None else extension().memory_in_use().get("cpu", 0)
        check_host_memory(more, self.host_memory, what, taken=taken)


class RegisteredBuffer(TieredBuffer):
    """A buffer that stays where it was put. Made by `RegisteredTier.allocate`."""

    def __init__(self, tier: RegisteredTier, block: Any, nbytes: int, split: int) -> None:
        super().__init__(
            nbytes=nbytes,
            page_bytes=tier.page_bytes,
            address=int(block.address),
            device=tier.exported_device,
            tier=tier.name,
            split=split,
        )
        self._block = block

    def physical_bytes(self) -> TierBytes:
        held = int(self._block.physical_bytes)
        return TierBytes(0, held) if self._block.host else TierBytes(held, 0)

    def nearest_split(self, split: int) -> int:
        """The current split: registered memory cannot be replaced under its address."""
        return self.split

    def _fill(self, source: torch.Tensor, offset_bytes: int) -> None:
        self._block.write(source.data_ptr(), source.nbytes, offset_bytes)

    def _remote_bytes(self) -> torch.Tensor:
        self.check_usable()
        host, nbytes = int(self._block.host), self.nbytes - self.split
        return bytes_tensor(self, host, nbytes, torch.device("cpu"))
