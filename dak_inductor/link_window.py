"""The backend's option `window`: bytes that kernels may have in flight from a remote tier."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.window import window_of, windows
from dak_inductor.cuda_runtime.window_history import WindowHistory, update_entry
from dak_inductor.errors import OptionError
from dak_inductor.options import WindowOption

log = logging.getLogger(__name__)

_SLOW = 0.7  # of the profile's bandwidth: less is worth a line in the log
_said: set[tuple[str, str]] = set()


@dataclass(frozen=True, slots=True)
class LinkWindow:
    """The window of the link between a GPU and a remote tier, as it is now.

    `in_use`: False on the simulated tier, where nothing is in flight and the option has no effect.
    `automatic`: whether kernels change it; `nbytes` is what they last made of it.
    """

    tier: str
    nbytes: int
    in_use: bool
    automatic: bool = False

    def __str__(self) -> str:
        effect = "" if self.in_use else "; without effect on this tier"
        kind = ", automatic" if self.automatic else ""
        return f"window of the link to {self.tier}: {self.nbytes} bytes in flight{kind}{effect}"


def set_windows(window: WindowOption, buffers: Iterable[TieredBuffer]) -> None:
    """Set the window of every link that these buffers are read through, from the next launch on.

    A link has one window: all graphs and models that read through it share it, captured CUDA graphs
    included. "auto" leaves a window that kernels change as it is. Raises OptionError, with nothing
    set, above what the SMs of the GPU can take in.
    """
    links = {(buffer.device, buffer.tier) for buffer in buffers if buffer.device.type == "cuda"}
    for device, tier in links:
        most = shared_memory_bytes(device)
        if window != "auto" and window > most:
            raise OptionError(
                f"window={window} for the link from {device} to {tier!r}: what is in flight lands "
                f"in shared memory, and all SMs of that GPU together have {most} bytes of it"
            )
    for device, tier in links:
        window_of(device, tier).set(window)


def shared_memory_bytes(device: torch.device) -> int:
    """Shared memory of all SMs of a GPU together."""
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_multiprocessor * properties.multi_processor_count


def window_in_force(
    device: torch.device, tier: str, asked: Iterable[WindowOption]
) -> LinkWindow | None:
    """The link's window; on the simulated tier the last of those `asked` for in bytes, None if
    there is none."""
    if device.type == "cuda":
        found = window_of(device, tier)
        return LinkWindow(tier, found.nbytes, in_use=True, automatic=found.automatic)
    last = next((each for each in reversed(tuple(asked)) if each != "auto"), None)
    return None if last is None else LinkWindow(tier, last, in_use=False)


def window_changes(device: torch.device, tier: str) -> list[dict[str, float]]:
    """What kernels made of the link's window, as in a record's `window_history`."""
    if device.type != "cuda":
        return []
    changes = window_of(device, tier).history().changes
    return [update_entry(change.seconds, change.nbytes, change.delay) for change in changes]


def histories() -> tuple[WindowHistory, ...]:
    """What kernels made of the windows of all links read through so far; waits for nothing.

    A link much slower than its profile is logged, once.
    """
    found = []
    for window in windows():
        history = window.history()
        found.append(history)
        seen, expected = history.bandwidth, window.link.direct_bandwidth
        key = (history.device, history.tier)
        if seen is not None and seen < _SLOW * expected and key not in _said:
            _said.add(key)
            log.warning(
                "the link from %s to %s brings %.1f GB/s where %.1f were expected; its window was "
                "adapted to %d bytes",
                *key, seen / 1e9, expected / 1e9, history.nbytes,
            )  # fmt: skip
    return tuple(found)
