"""What to do when the device runs out of memory while offloaded models run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dak_inductor.offloaded_model import OffloadedModel


def advice(models: Sequence[OffloadedModel], error: torch.OutOfMemoryError) -> str:
    """What to do about it: tiered pages are not the caching allocator's to take back."""
    reason = str(error).splitlines()[0]
    if not models:
        return (
            f"{reason} Nothing of this model is offloaded: call dak.offload(model, gpu_memory=...)."
        )
    budget = models[0].budget
    held = sum((model.physical_bytes().local for model in models), 0)
    return (
        f"{reason} Offloaded weights hold {held / 1e9:.2f} GB of the device under gpu_memory="
        f"{budget.limit / 1e9:.2f} GB, of which {budget.reserve / 1e9:.2f} GB were kept for "
        "activations. Lower gpu_memory by the size of the allocation that failed, or use smaller "
        "batches."
    )
