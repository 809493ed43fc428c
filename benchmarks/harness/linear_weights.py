"""Copies of one weight, each tiered at the same split, enough of them to outgrow the L2 cache."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.tier_bytes import TierBytes

LABEL = "linear"
"""What the buffers are called in the counts of the simulated tier."""


@dataclass(frozen=True, slots=True)
class TieredWeights:
    """Equal weights [N, K] on separate tiered buffers; they live as long as this record."""

    buffers: tuple[TieredBuffer, ...]
    tensors: tuple[Tensor, ...]

    @property
    def bytes_each(self) -> TierBytes:
        """Bytes of one of them by tier."""
        return self.buffers[0].bytes_by_tier()


def tiered_copies(values: Tensor, tier: Tier, *, split: int, copies: int = 1) -> TieredWeights:
    """`copies` tiered tensors with the contents of `values`, [0, split) bytes of each local.

    Pages on the host are made here, at 3 to 6 GB/s, and filled by the device.
    """
    source = values.contiguous()
    buffers, tensors = [], []
    for _ in range(copies):
        buffer = tier.allocate(source.nbytes, split=split)
        buffer.label = LABEL
        tensors.append(buffer.tensor(source.dtype, tuple(source.shape)).copy_(source))
        buffers.append(buffer)
    return TieredWeights(tuple(buffers), tuple(tensors))


def split_at(nbytes: int, fraction: float) -> int:
    """Local bytes of a weight of which `fraction` is remote."""
    return nbytes - round(fraction * nbytes)
