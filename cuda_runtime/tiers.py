"""Opening a remote tier by its name."""

from __future__ import annotations

import re

import torch

from dak_inductor.cuda_runtime.simulated import DEFAULT_PAGE_BYTES, SimulatedTier
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.errors import TierError

REMOTE_NAMES = '"cpu", "cuda:<index>" or "simulated"'


def open_tier(
    remote: str,
    *,
    device: torch.device | None = None,
    host_memory: int | None = None,
    page_bytes: int | None = None,
) -> Tier:
    """The tier named `remote` as seen from `device` (default: the current CUDA device).

    `host_memory` replaces what is taken as available; `page_bytes` is for the simulated tier only.
    Raises TierError for a name that is none, or a tier this machine does not have.
    """
    check_remote(remote, device)
    if remote == "simulated":
        return SimulatedTier(page_bytes=page_bytes or DEFAULT_PAGE_BYTES, host_memory=host_memory)
    from dak_inductor.cuda_runtime.vmm import open_device_tier  # needs the extension and a driver

    return open_device_tier(remote, device=local_device(device), host_memory=host_memory)


def check_remote(remote: str, device: torch.device | None = None) -> None:
    """Raise TierError unless `remote` names a tier that this machine has; opens nothing."""
    if not isinstance(remote, str) or not re.fullmatch(r"cpu|simulated|cuda:\d+", remote):
        raise TierError(f"remote={remote!r} names no tier: {REMOTE_NAMES}")
    if remote == "simulated":
        return
    if not torch.cuda.is_available():
        raise TierError(
            f'remote={remote!r} needs an NVIDIA GPU, and torch finds none here. remote="simulated" '
            "keeps both tiers in CPU memory and runs everything else as it is."
        )
    if remote.startswith("cuda:"):
        peer, count = int(remote.removeprefix("cuda:")), torch.cuda.device_count()
        local = local_device(device).index
        if peer >= count:
            raise TierError(
                f"remote={remote!r}: this machine has {count} GPU(s), cuda:0 to cuda:{count - 1}"
            )
        if peer == local:
            raise TierError(
                f"remote={remote!r} is the GPU the model runs on; the remote tier is another one"
            )


def local_device(device: torch.device | None) -> torch.device:
    """`device` with its index filled in; None is the current CUDA device."""
    if device is None:
        return torch.device("cuda", torch.cuda.current_device())
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
