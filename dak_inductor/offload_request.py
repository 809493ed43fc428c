"""What the user asked of `offload` or `loading`, checked as far as that needs no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dak_inductor.byte_size import asked_host_memory, parse_budget
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.tiers import check_remote, local_device, open_tier
from dak_inductor.errors import BudgetError, OptionError, TierError
from dak_inductor.plan import Plan

MINIMUM_DIVIDED_BYTES = 64 << 10


def default_remote() -> str:
    """The remote tier where a command is given none: host memory, simulated without a GPU."""
    return "cpu" if torch.cuda.is_available() else "simulated"


@dataclass(frozen=True, slots=True)
class OffloadRequest:
    """The arguments of `offload`. Raises a named error at once for what cannot be."""

    gpu_memory: str | int | None = None
    offload_ratio: float | None = None
    remote: str = "cpu"
    placement: Mapping[str, str] | None = None
    host_memory: str | int | None = None
    device: torch.device | str | int | None = None
    strict: bool = False
    progress: bool = True
    plan: Plan | str | Path | None = None

    def __post_init__(self) -> None:
        given = [
            name for name in ("gpu_memory", "offload_ratio") if getattr(self, name) is not None
        ]
        if len(given) == 2 or (not given and self.plan is None):
            raise OptionError(
                'say one of gpu_memory (such as "24GB") and offload_ratio (such as 0.3), '
                f"{'not both' if given else 'neither was given'}"
            )
        if self.plan is not None and self.offload_ratio is not None:
            raise OptionError("a plan says itself how much is remote: leave offload_ratio out")
        check_ratio(self.offload_ratio, of="the weight bytes")
        asked_host_memory(self.host_memory)
        if self.placement is not None and not isinstance(self.placement, Mapping):
            raise OptionError(
                f"placement={self.placement!r}: a mapping, such as {{'lm_head': 'gpu'}}"
            )

    def resolved_device(self) -> torch.device:
        """The device the model will be on. Raises TierError where this machine does not have it."""
        wanted = None if self.device is None else _device(self.device)
        check_remote(self.remote, wanted)
        if self.remote == "simulated":
            if wanted is not None and wanted.type != "cpu":
                raise TierError(
                    f'remote="simulated" keeps the model on the CPU, not on device={self.device!r}'
                )
            return torch.device("cpu")
        if wanted is not None and wanted.type != "cuda":
            raise TierError(f"device={self.device!r}: the model runs on a CUDA device")
        return local_device(wanted)

    def budget_bytes(self, device: torch.device) -> int | None:
        """`gpu_memory` in bytes; None where it was not given."""
        if self.gpu_memory is None:
            return None
        card = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None
        return parse_budget(self.gpu_memory, card)

    def open_tier(self, device: torch.device) -> Tier:
        """The remote tier as seen from `device`."""
        return open_tier(
            self.remote, device=device, host_memory=asked_host_memory(self.host_memory)
        )

    def minimum_bytes(self, tier: Tier) -> int:
        """Tensors below this many bytes stay whole: a page, and on real tiers at least 64 KiB."""
        return (
            tier.page_bytes
            if tier.name == "simulated"
            else max(tier.page_bytes, MINIMUM_DIVIDED_BYTES)
        )


def _device(device: torch.device | str | int) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TierError(f"device={device!r} is no device: {error}") from error


def check_ratio(ratio: object, *, of: str) -> None:
    """Raise BudgetError for an `offload_ratio` that is given and no share of what it is `of`."""
    if ratio is not None and (
        isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1
    ):
        raise BudgetError(f"offload_ratio={ratio!r}: a share of {of} from 0 to 1")
