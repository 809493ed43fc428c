"""Memory in use as the driver and the kernel count it, and its peak while something runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch


def host_bytes_used(meminfo: Path = Path("/proc/meminfo")) -> int:
    """MemTotal - MemAvailable: holds too on machines whose total grows while they run."""
    fields = {}
    for line in meminfo.read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) * 1024
    return fields["MemTotal"] - fields["MemAvailable"]


def device_bytes_used(index: int = 0) -> int:
    """Bytes in use on torch's device `index` as NVML counts them; needs no CUDA context.

    Without NVML, total - free of `cudaMemGetInfo`, which creates a context first. Raises
    RuntimeError on a machine without a GPU.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = _nvml_handle(pynvml, index)
        try:
            info = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
        except (
            AttributeError,
            TypeError,
        ):  # an older binding: its figure includes what is reserved
            info = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return int(info.used)
    except ImportError:
        pass
    if not torch.cuda.is_available():
        raise RuntimeError("no GPU on this machine, so no device memory to count")
    free, total = torch.cuda.mem_get_info(index)
    return total - free


def _nvml_handle(nvml: Any, index: int) -> Any:
    """NVML counts the machine's cards, CUDA those that it may see."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") is None:
        return nvml.nvmlDeviceGetHandleByIndex(index)
    return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")


class PeakMemory:
    """Samples a counter from a thread; `peak` is the largest value seen inside the `with` block."""

    def __init__(self, count: Callable[[], int], *, interval: float = 0.002) -> None:
        self.count, self.interval = count, interval
        self.start = self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self.start = self.peak = self.count()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, self.count())

    def _sample(self) -> None:
        while not self._stop.wait(self.interval):
            self.peak = max(self.peak, self.count())
