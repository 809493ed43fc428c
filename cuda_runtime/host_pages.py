"""Sharing a buffer's host pages with another process, as file descriptors.

One process exports and sends the descriptors (over a Unix socket, or to a child by inheritance);
the other imports them and has the same bytes at an address of its own. Neither copies.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from dak_inductor.cuda_runtime.exported import bytes_tensor
from dak_inductor.cuda_runtime.nvrtc import extension
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.vmm import VmmTier
from dak_inductor.cuda_runtime.vmm_buffer import VmmBuffer
from dak_inductor.errors import TierError


@dataclass(frozen=True, slots=True)
class HostPageFile:
    """One allocation of host pages.

    fd: its file descriptor, owned by whoever holds this record (`close`).
    bytes: its size, whole pages.
    offset: of its first byte from byte 0 of the buffer; negative for the part of a page before it.
    """

    fd: int
    bytes: int
    offset: int

    def close(self) -> None:
        os.close(self.fd)


def export_host_pages(buffer: TieredBuffer) -> list[HostPageFile]:
    """The host pages of a buffer in address order, as they are until its next move.

    Raises TierError for a buffer without host pages of the driver's own.
    """
    buffer.check_usable()
    if not isinstance(buffer, VmmBuffer) or buffer.tier != "cpu":
        raise TierError(f"a buffer of tier {buffer.tier!r} has no host pages that can be shared")
    return [HostPageFile(*file) for file in buffer._memory.export_host_pages()]


class ImportedHostPages:
    """Host pages of another process, readable and writable by this one's CPU and GPU.

    start, stop: the bytes of the exporter's buffer that they hold.
    """

    def __init__(self, memory: Any, start: int, stop: int, device: torch.device) -> None:
        self.start = start
        self.stop = stop
        self._memory = memory
        self._device = device

    def tensor(self, device: str = "cpu") -> torch.Tensor:
        """uint8 tensor over [start, stop), on "cpu" or, for kernels, on "cuda"."""
        on_cpu = device == "cpu"
        where = torch.device("cpu") if on_cpu else self._device
        address = self._memory.cpu_address if on_cpu else self._memory.address
        return bytes_tensor(self._memory, address, self.stop - self.start, where)


def import_host_pages(files: Sequence[HostPageFile], tier: VmmTier) -> ImportedHostPages:
    """Map pages that another process exported; the descriptors may be closed afterwards.

    Raises TierError unless they follow one another, DriverError where the driver refuses them.
    """
    for before, after in pairwise(files):
        if before.offset + before.bytes != after.offset:
            raise TierError(
                f"host pages at {after.offset} do not follow those that end at "
                f"{before.offset + before.bytes}"
            )
    if not files:
        raise TierError("there are no host pages to import")
    native = extension().ImportedPages(tier._tier, [(file.fd, file.bytes) for file in files])
    start = files[0].offset
    return ImportedHostPages(native, start, start + native.nbytes, tier.exported_device)
