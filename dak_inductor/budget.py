"""How many bytes a device may use, and how many of them weights may take.

`gpu_memory` is everything that may be in use on a device: weights, KV caches, activations, graph
pools, the CUDA context and its libraries, and what other processes hold there. All models of this
process on one device share one budget.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dak_inductor.cuda_runtime import address_table
from dak_inductor.offloaded_model import OffloadedModel, PlannedCache

MINIMUM_RESERVE = 512 << 20
RESERVE_SHARE = 0.06
CONTEXT_GROWTH = 320 << 20
"""Kept beside what activations take: kernels load lazily, and the CUDA context, which torch's
caching allocator does not see, grows with them for some steps."""


@dataclass(frozen=True, slots=True)
class BudgetTerms:
    """How a budget is spent, in bytes; `available` is what is left for divided weights."""

    total: int
    context: int  # CUDA context, libraries, other processes on the card
    tensors: int  # ordinary tensors on the device, activations' reserve not included
    reserve: int  # kept for activations, other KV caches and graph pools
    other_models: int  # of other models and caches, or claimed by those being loaded

    @property
    def available(self) -> int:
        return self.total - self.context - self.tensors - self.reserve - self.other_models

    def __str__(self) -> str:
        return (
            f"{self.total:,} bytes, less {self.context:,} for the CUDA context, libraries and "
            f"other processes, {self.tensors:,} for tensors that stay whole, "
            f"{self.reserve:,} kept for activations, "
            f"{self.other_models:,} held by other offloaded models"
        )


class DeviceBudget:
    """The memory of one device, shared by all models offloaded from it. Not thread-safe.

    Args:
        device: a CUDA device, or the CPU, which plays the GPU for the simulated tier.
        total: bytes that may be used; None: as many as the device has.
    """

    def __init__(self, device: torch.device, total: int | None = None) -> None:
        self.device = device
        self.total = total
        self.models: weakref.WeakSet[OffloadedModel] = weakref.WeakSet()
        self.claims: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
        """Bytes that models still on their way will hold, by whoever loads them."""
        self.loose_caches: weakref.WeakSet[PlannedCache] = weakref.WeakSet()
        """KV caches on this device whose model is not offloaded."""
        self._measured_peak: int | None = None

    @property
    def is_simulated(self) -> bool:
        return self.device.type != "cuda"

    @property
    def limit(self) -> int:
        """`total`, or what the card has; practically unlimited for a simulated GPU without one."""
        if self.total is not None:
            return self.total
        return 1 << 60 if self.is_simulated else torch.cuda.mem_get_info(self.device)[1]

    @property
    def reserve(self) -> int:
        """Bytes kept for activations, and for kernels that are not loaded yet.

        Until a step's peak was measured: a share of the budget, on the safe side.
        """
        if self._measured_peak is not None:
            return max(0, self._measured_peak - self.tensor_bytes())
        if self.is_simulated:
            return 0
        return max(MINIMUM_RESERVE, math.ceil(RESERVE_SHARE * self.limit)) + CONTEXT_GROWTH

    def measured_peak(self, nbytes: int) -> None:
        """Replace the reserve by the peak that torch's caching allocator reserved over a step."""
        self._measured_peak = nbytes

    def measure(self) -> list[str]:
        """Take the allocator's peak since the last offload, if it tells more than is known.

        Returns a sentence for the log where the reserve changed. Nothing on a simulated GPU.
        """
        if self.is_simulated:
            return []
        peak = torch.cuda.max_memory_reserved(self.device) + CONTEXT_GROWTH
        if self._measured_peak is not None and peak <= self._measured_peak:
            return []
        before = self.reserve
        self.measured_peak(peak)
        return [
            f"{self.device}: torch's allocator peaked at {peak / 1e9:.2f} GB; activations: "
            f"{self.reserve / 1e9:.2f} GB (was {before / 1e9:.2f})"
        ]

    def tensor_bytes(self) -> int:
        """Bytes of ordinary tensors on the device now."""
        if self.is_simulated:
            return sum(model.resident_bytes for model in self.models)
        return torch.cuda.memory_allocated(self.device)

    def context_bytes(self) -> int:
        """What the driver counts as used, less torch's allocator and tiered tensors' pages."""
        if self.is_simulated:
            return 0
        free, card = torch.cuda.mem_get_info(self.device)
        held = 0
        for buffer in address_table.live_buffers():
            pages = buffer.physical_bytes()
            held += pages.local if buffer.device == self.device else 0
            held += pages.remote if buffer.tier == str(self.device) else 0
        return max(0, card - free - torch.cuda.memory_reserved(self.device) - held)

    def terms(
        self, model: OffloadedModel | None = None, *, arriving: int = 0, leaving: int = 0
    ) -> BudgetTerms:
        """How the budget is spent as far as `model`'s divided weights and caches are concerned.

        `arriving` bytes of ordinary tensors will still come to the device, `leaving` bytes of those
        there now will go.
        """
        others = sum(other.claimed_bytes().local for other in self.models if other is not model)
        others += sum(
            tensor.buffer.claimed_bytes().local
            for cache in self.loose_caches
            for tensor in cache.tensors
        )
        others += sum(self.claims.values())
        tensors = max(0, self.tensor_bytes() + arriving - leaving)
        return BudgetTerms(self.limit, self.context_bytes(), tensors, self.reserve, others)

    def weight_bytes_available(self, model: OffloadedModel | None = None) -> int:
        """Bytes of HBM pages that weights and caches of `model` (None: a new one) may hold."""
        return max(0, self.terms(model).available)


_budgets: dict[str, DeviceBudget] = {}


def device_budget(device: torch.device) -> DeviceBudget:
    """The budget of `device`, shared by its models; a new one once they are gone."""
    known = _budgets.get(str(device))
    if known is None or not (known.models or known.claims or known.loose_caches):
        known = _budgets[str(device)] = DeviceBudget(device)
    return known


@contextmanager
def asked_budget(device: torch.device, total: int | None) -> Iterator[DeviceBudget]:
    """The device's budget with a new total, if one is given; the old one again after an error."""
    budget = device_budget(device)
    before = budget.total
    if total is not None:
        budget.total = total
    try:
        yield budget
    except BaseException:
        budget.total = before
        raise
