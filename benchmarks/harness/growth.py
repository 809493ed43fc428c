"""Whether what a process holds grows while it runs: samples, a line through them, a verdict."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dak_inductor.benchmarks.harness.record import Verdict
from dak_inductor.cuda_runtime import vmm
from dak_inductor.session import SESSION

TOLERANCES: Mapping[str, float] = {
    "host_bytes": 24 << 20,  # the allocator of the C library keeps what threads gave back
    "device_bytes": 4 << 20,  # two pages
    "tiered_bytes": 0.5,
    "torch_device_bytes": 1 << 20,
    "objects": 500,
    "bindings": 0.5,
    "files": 0.5,
    "threads": 0.5,
}
"""What each count may grow by from the first sample used to the last; of what is whole, nothing."""

WARM_UP = 0.25
"""Share of the samples, the first ones, in which caches still fill."""


def sample() -> dict[str, float]:
    """What the process holds now, garbage collected and work of the device done.

    Bytes in memory of host and device, of tiered memory by the ledger of the extension, of tensors
    by torch; Python objects that the collector knows, bindings of compiled graphs, open files and
    threads.
    """
    gc.collect()
    found: dict[str, float] = {}
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        vmm.drain(10)
        free, total = torch.cuda.mem_get_info()
        found["device_bytes"] = total - free
        found["torch_device_bytes"] = torch.cuda.memory_allocated()
        found["tiered_bytes"] = sum(vmm.memory_in_use().values())
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    found["host_bytes"] = pages * os.sysconf("SC_PAGE_SIZE")
    found["objects"] = len(gc.get_objects())
    found["bindings"] = len(SESSION.bindings())
    found["files"] = len(os.listdir("/proc/self/fd"))
    found["threads"] = threading.active_count()
    return found


@dataclass(frozen=True, slots=True)
class Growth:
    """A line through samples: `grown` from the first to the last of them, give or take `error`."""

    grown: float
    error: float
    samples: int

    def within(self, tolerance: float) -> bool:
        """Whether the growth is not above `tolerance`, or no more than the noise about the line."""
        return self.grown <= max(tolerance, 3 * self.error)


def growth(values: Sequence[float]) -> Growth:
    """The least-squares line through equally spaced samples, and thrice its standard error.

    Fewer than four samples tell nothing: the error is infinite.
    """
    count = len(values)
    if count < 4:
        return Growth(0.0, float("inf"), count)
    place = np.arange(count) / (count - 1)
    (slope, start), covariance = np.polyfit(place, values, 1, cov="unscaled")
    rest = np.asarray(values) - (slope * place + start)
    error = np.sqrt(covariance[0, 0] * float(rest @ rest) / (count - 2))
    return Growth(float(slope), float(error), count)


def verdicts(
    samples: Sequence[Mapping[str, float]], what: str, tolerances: Mapping[str, float] = TOLERANCES
) -> list[Verdict]:
    """One verdict for each count in the samples, the first ones left out."""
    used = samples[round(WARM_UP * len(samples)) :]
    made = []
    for name in sorted(used[0]) if used else ():
        line = growth([float(each[name]) for each in used])
        bar = tolerances[name]
        passed = line.within(bar) if line.samples >= 4 else None
        note = f"{line.samples} samples, standard error {line.error:.3g}"
        unit = "bytes" if name.endswith("bytes") else "more"
        made.append(Verdict(f"{what}: {name} grow by", line.grown, bar, unit, passed, note))
    return made
