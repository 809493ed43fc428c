"""Tile shapes of the portable linear kernel, by rows of the input and what the GPU holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

DEFAULT_WINDOW = 512 * 1024
"""Remote bytes in flight where the record names no window: past about 0.5 MB local reads starve."""

REMOTE_ROWS = 16
"""Rows of an "in_out" weight that a program has under way while it reads remote ones."""

_RESERVED = 2 * 1024  # shared memory per block besides the stages: the driver's, and scratch
_MOST_STAGES = 4


@dataclass(frozen=True, slots=True)
class TileConfiguration:
    """A tile of the result is [m, n]; `k` elements are contracted at a time, `stages` deep."""

    m: int
    n: int
    k: int
    stages: int
    warps: int

    def shared_bytes(self, itemsize: int, *, hopper: bool) -> int:
        """Shared memory of one program, which Triton's pipeline fills with x and weight tiles.

        wgmma reads its operands from shared memory, so Hopper keeps one stage more (m >= 64).
        """
        buffers = self.stages if hopper and self.m >= 64 else self.stages - 1
        return buffers * (self.m + self.n) * self.k * itemsize + _RESERVED

    def bytes_in_flight(self, itemsize: int) -> int:
        """Weight bytes that one program has requested and not yet received, at most."""
        return (self.stages - 1) * self.n * self.k * itemsize


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """What a GPU holds; shared memory in bytes, per block as far as a kernel may opt in."""

    processors: int
    shared_bytes_per_block: int
    shared_bytes_per_processor: int
    hopper: bool

    def programs(self, configuration: TileConfiguration, itemsize: int, *, out_in: bool) -> int:
        """Programs that run at once, two per processor at most: the persistent grid.

        Of an "in_out" weight every program reads remote rows: one per processor, so that their
        small loads (REMOTE_ROWS) stay within the window.
        """
        each = configuration.shared_bytes(itemsize, hopper=self.hopper)
        fitting = self.shared_bytes_per_processor // each
        return max(2, self.processors * (2 if out_in and fitting >= 2 else 1))


def device_limits(device: torch.device) -> DeviceLimits:
    """The limits of a CUDA device."""
    properties: Any = torch.cuda.get_device_properties(device)
    return DeviceLimits(
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        properties.shared_memory_per_multiprocessor,
        properties.major == 9,
    )


# m, n, k for elements of two bytes, and warps. Decode wants 128 x 128 tiles of the weight: 64 x 128
# ones took 1.40 of the limit at 2% remote where these took 1.02 (H200, M = 16, [28672, 8192]).
_TILES = ((16, 128, 128, 4), (32, 128, 128, 4), (64, 128, 64, 4), (128, 128, 64, 8))


def configurations(
    itemsize: int, limits: DeviceLimits, *, out_in: bool
) -> tuple[TileConfiguration, ...]:
    """What fits, by growing m: of each tile the deepest pipeline."""
    found: list[TileConfiguration] = []
    for m, n, most_k, warps in _TILES:
        # The three loops over an "in_out" weight spill registers at 128.
        k = (most_k if out_in else min(most_k, 64)) * 2 // itemsize
        for stages in range(_MOST_STAGES, 1, -1):
            candidate = TileConfiguration(m, n, k, stages, warps)
            needed = candidate.shared_bytes(itemsize, hopper=limits.hopper)
            if needed <= limits.shared_bytes_per_block:
                found.append(candidate)
                break
    return tuple(found)


def choose_configuration(
    *, rows: int, itemsize: int, limits: DeviceLimits, out_in: bool
) -> TileConfiguration:
    """The smallest tile that holds `rows`, else the largest there is."""
    fitting = configurations(itemsize, limits, out_in=out_in)
    return next((each for each in fitting if each.m >= rows), fitting[-1])
