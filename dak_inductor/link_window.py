"""The backend's option `window`: bytes that kernels may have in flight from a remote tier."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.window import window_of
from dak_inductor.errors import OptionError


@dataclass(frozen=True, slots=True)
class LinkWindow:
    """The window of the link between a GPU and a remote tier, as it is now.

    `in_use`: False on the simulated tier, where nothing is in flight and the option has no effect.
    """

    tier: str
    nbytes: int
    in_use: bool

    def __str__(self) -> str:
        effect = "" if self.in_use else "; without effect on this tier"
        return f"window of the link to {self.tier}: {self.nbytes} bytes in flight{effect}"


def set_windows(nbytes: int, buffers: Iterable[TieredBuffer]) -> None:
    """Set the window of every link that these buffers are read through, from the next launch on.

    A link has one window: all graphs and models that read through it share it, captured CUDA graphs
    included. Raises OptionError, with nothing set, above what the SMs of the GPU can take in.
    """
    links = {(buffer.device, buffer.tier) for buffer in buffers if buffer.device.type == "cuda"}
    for device, tier in links:
        most = shared_memory_bytes(device)
        if nbytes > most:
            raise OptionError(
                f"window={nbytes} for the link from {device} to {tier!r}: what is in flight lands "
                f"in shared memory, and all SMs of that GPU together have {most} bytes of it"
            )
    for device, tier in links:
        window_of(device, tier).set(nbytes)


def shared_memory_bytes(device: torch.device) -> int:
    """Shared memory of all SMs of a GPU together."""
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_multiprocessor * properties.multi_processor_count


def window_in_force(device: torch.device, tier: str, asked: Iterable[int]) -> LinkWindow | None:
    """The link's window; on the simulated tier the last of those `asked` for, None if there is
    none."""
    if device.type == "cuda":
        return LinkWindow(tier, window_of(device, tier).nbytes, in_use=True)
    last = next(reversed(tuple(asked)), None)
    return None if last is None else LinkWindow(tier, last, in_use=False)
