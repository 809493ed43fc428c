"""Times of short pieces of GPU work, as they are in a model: weights not in L2, the host ahead, and
another kernel before and behind.

What is timed alone between two events takes 8 to 13 us more than in a CUDA graph, not the same of
each kernel: at 0.5% remote a product of 36.6 us and one of 31.8 us looked equal (H200).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from dak_inductor.cuda_runtime.kernel import load
from dak_inductor.cuda_runtime.nvrtc import KernelInstance, instance

NEIGHBOUR = instance("neighbour")
KERNELS: tuple[KernelInstance, ...] = (NEIGHBOUR,)
_NEIGHBOUR_CTAS, _NEIGHBOUR_THREADS = 16, 128
ROUNDS = 4
CALLS = 4
"""Of short work between two events."""
SHORT_SECONDS = 5e-4
HEAD_START_CYCLES = 1_000_000
"""Half a millisecond for each call: through Python one takes the host longer than the GPU, and what
is timed is to be queued whole before it starts, as in a CUDA graph."""
L2_MULTIPLE = 2

Run = Callable[[], object]
_Events = tuple[torch.cuda.Event, torch.cuda.Event]


@torch.no_grad()
def seconds_of(
    runs: Sequence[Run], device: torch.device, *, in_graph: bool = False
) -> tuple[float, ...]:
    """Seconds of each run on the current stream of `device`, the least of a few rounds: what else
    uses the card only adds.

    in_graph: each is timed between kernels like those that Inductor generates: the run may start
        beside the one ahead, and the one behind beside the run.

    Each runs once before, to compile and plan, and then in turn with the others. Takes twice as
    much device memory as L2 has, until it returns; what runs return is dropped. Waits for the
    stream.
    """
    with torch.cuda.device(device):
        for run in runs:
            run()
        nbytes = torch.cuda.get_device_properties(device).L2_cache_size
        scratch = torch.zeros(L2_MULTIPLE * nbytes // 4, dtype=torch.float32, device=device)
        flush = scratch.sum  # reads: what is written would be written back during a run
        beside = _neighbour(device) if in_graph else _nothing
        longest = max(_elapsed(_queue(flush, beside, run, 1)) for run in runs)
        calls = CALLS if longest < SHORT_SECONDS else 1
        every = (*runs, _nothing)
        events = [[_queue(flush, beside, run, calls) for run in every] for _ in range(ROUNDS)]
        *timed, idle = (min(map(_elapsed, each)) for each in zip(*events, strict=True))
    if min(timed) <= idle:  # others use the card: the difference of two times means nothing
        idle = 0.0
    return tuple((seconds - idle) / calls for seconds in timed)


def _nothing() -> None:
    """No work."""


def _neighbour(device: torch.device) -> Run:
    """A launch like those of Inductor's kernels around a product. Raises CompilationError,
    DriverError."""
    return partial(
        load(NEIGHBOUR, device.index).launch,
        grid=(_NEIGHBOUR_CTAS, 1, 1),
        block=(_NEIGHBOUR_THREADS, 1, 1),
        arguments=(),
        overlap=True,
    )


def _queue(flush: Run, beside: Run, run: Run, calls: int) -> _Events:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START_CYCLES * calls)
    start.record()
    for _ in range(calls):
        flush()
        beside()
        run()
        beside()
    flush()
    stop.record()
    return start, stop


def _elapsed(events: _Events) -> float:
    start, stop = events
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3
