"""Times of short pieces of GPU work, as they are in a model: weights not in L2, host ahead."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

ROUNDS = 3
HEAD_START_CYCLES = 2_000_000
"""A millisecond: a call through Python takes the host longer than the GPU, and what is timed is to
be queued whole before it starts, as in a CUDA graph."""


@torch.no_grad()
def medians(runs: Sequence[Callable[[], object]], device: torch.device) -> tuple[float, ...]:
    """Seconds of each run on the current stream of `device`.

    Each runs once before, to compile and plan, and then in turn with the others. Takes as much
    device memory as L2 has, until it returns; what runs return is dropped. Waits for the stream.
    """
    with torch.cuda.device(device):
        for run in runs:
            run()
        nbytes = torch.cuda.get_device_properties(device).L2_cache_size
        scratch = torch.empty(nbytes, dtype=torch.uint8, device=device)
        events = [[_timed(run, scratch) for run in runs] for _ in range(ROUNDS)]
        events[-1][-1][1].synchronize()
    return tuple(
        statistics.median(start.elapsed_time(stop) / 1e3 for start, stop in of_run)
        for of_run in zip(*events, strict=True)
    )


def _timed(
    run: Callable[[], object], scratch: torch.Tensor
) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    scratch.zero_()  # weights leave L2
    torch.cuda._sleep(HEAD_START_CYCLES)
    start.record()
    run()
    stop.record()
    return start, stop
