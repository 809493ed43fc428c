"""Where remote rows may be copied ahead, and how much device memory their ring may take."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from dak_inductor.budget import DeviceBudget
from dak_inductor.copy_ring import RING_SHARE, expected_ring_bytes
from dak_inductor.hardware_profile import HardwareProfile
from dak_inductor.lowering.ahead.ring_room import Room
from dak_inductor.lowering.refusals import HOPPER, capability
from dak_inductor.offloaded_model import OffloadedModel
from dak_inductor.options import copies_ahead_by_default

DEVICES: tuple[str, ...] = ()
"""Besides cards, where copies ahead are of use: on the simulated tier of the CPU nothing is faster
or slower."""


def copies_help(device: torch.device) -> bool:
    """Whether copies ahead can make products on `device` faster; a graph's options may say no.

    They are of products that the CUDA templates serve, for which a GPU has to be a Hopper card.
    """
    return _is_served(device) if device.type == "cuda" else device.type in DEVICES


@lru_cache(maxsize=16)
def _is_served(device: torch.device) -> bool:
    """Asked by every call of a graph. A card that is not there is planned for as a Hopper card."""
    if not torch.cuda.is_available():
        return True
    index = torch.cuda.current_device() if device.index is None else device.index
    return capability(index) == HOPPER


def expected_ring(budget: DeviceBudget) -> int:
    """Bytes of the ring of a model that no graph was compiled for yet; 0 where it will have none.

    Activations have more of the budget kept for them than this.
    """
    if not (copies_help(budget.device) and copies_ahead_by_default()):
        return 0
    return expected_ring_bytes(budget.limit)


def expected_ring_by_profile(profile: HardwareProfile, budget: int) -> int:
    """The same of a GPU that is known by its profile alone, with a budget of so many bytes.

    One whose compute capability the profile does not say is planned for as a Hopper card.
    """
    is_served = profile.capability in (None, HOPPER)
    return expected_ring_bytes(budget) if is_served and copies_ahead_by_default() else 0


def ring_room(device: torch.device, models: Sequence[OffloadedModel]) -> Room:
    """What is left of the budget of these models, whose weights are on `device`.

    The ring comes from torch's allocator while a step runs, so the peak that is measured after the
    first such step has it, and the plan that follows counts it against `gpu_memory`. Until then it
    has to fit beside all that is there.
    """
    limits = [model.budget.limit for model in models]
    charged = any(m.budget.total is not None and m.offload_ratio is None for m in models)
    if device.type != "cuda":
        return Room(min(limits, default=1 << 60), charged)
    free, card = torch.cuda.mem_get_info(device)
    limit = min(limits, default=card)
    left = min(free, limit - (card - free))
    return Room(max(0, min(left, int(RING_SHARE * limit))), charged)
