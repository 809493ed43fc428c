"""Memory for benchmarks of a ring's fillers, and a replay whose result is right in any case."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dak_inductor.benchmarks.harness.copy_filler import CopyFiller
from dak_inductor.benchmarks.harness.ring_filler import RingFiller
from dak_inductor.benchmarks.harness.ring_load import RingLoad, ring_load
from dak_inductor.benchmarks.harness.stream_filler import StreamFiller
from dak_inductor.benchmarks.harness.streamer_shape import StreamerShape
from dak_inductor.benchmarks.harness.timing import CapturedStep, capture
from dak_inductor.cuda_runtime.tier import Tier

ROW = 8192
"""Elements of a row of the weights."""
ROW_BYTES = 2 * ROW
_POISON = 0xFF
"""Of bytes; no number as bfloat16."""


@dataclass(frozen=True, slots=True)
class FillerCase:
    """`source` lies in the remote tier, `reference` has the same in device memory: rows of random
    bfloat16, as bytes."""

    device: torch.device
    source: Tensor
    reference: Tensor
    ring: Tensor

    def load(self, part_bytes: int, nbytes: int | None = None) -> RingLoad:
        """The first `nbytes` of the source, or all of it."""
        return ring_load(self.source[:nbytes], self.ring, part_bytes)

    def poison(self) -> None:
        """No byte of the ring is one of the source."""
        self.ring.fill_(_POISON)


def make_case(tier: Tier, nbytes: int, ring_bytes: int, device: torch.device) -> FillerCase:
    values = torch.randn(nbytes // 2, dtype=torch.bfloat16, device=device).div_(math.sqrt(ROW))
    reference = values.view(torch.uint8)
    source = tier.allocate(nbytes, split=0).tensor(torch.uint8, (nbytes,)).copy_(reference)
    ring = torch.empty(ring_bytes, dtype=torch.uint8, device=device)
    return FillerCase(device, source, reference, ring)


def fillers_of(
    load: RingLoad, shapes: Sequence[StreamerShape], device: torch.device
) -> list[RingFiller]:
    """The copies first."""
    return [CopyFiller(load, device), *[StreamFiller(load, shape, device) for shape in shapes]]


def columns_of(filler: RingFiller) -> dict[str, object]:
    """What a row says of a filler."""
    found: dict[str, object] = {"filler": filler.name, "part_bytes": filler.load.part_bytes}
    if isinstance(filler, StreamFiller):
        shape = filler.shape
        found |= {
            "ctas": shape.ctas,
            "piece_bytes": shape.piece_bytes,
            "in_flight": shape.in_flight,
            "shared_bytes": shape.shared_bytes,
        }
    return found


def replay_or_copy(
    filler: RingFiller,
    copies: RingFiller,
    make_step: Callable[[RingFiller], Callable[[], None]],
    differing: Callable[[], str],
) -> str:
    """One replay of a step; where the filler gave up the same step with `copies`, so that what is
    left behind is right. `differing` says what is not. Returns what went wrong, "" for nothing."""
    _captured(make_step(filler))()
    given_up = filler.given_up()
    if given_up:
        _captured(make_step(copies))()
    torch.cuda.synchronize()
    wrong = differing()
    return f"{given_up}; by copies instead: {wrong or 'right'}" if given_up else wrong


def captured_all(
    fillers: Sequence[RingFiller], make_step: Callable[[RingFiller], Callable[[], None]]
) -> list[CapturedStep]:
    """The step with each filler."""
    return [_captured(make_step(filler)) for filler in fillers]


def _captured(step: Callable[[], None]) -> CapturedStep:
    """Without a call outside of the capture: a kernel that is then launched for the first time
    may have to be loaded, for which the driver can wait for the streamer, and this for it."""
    return capture(step, warmup=0)
