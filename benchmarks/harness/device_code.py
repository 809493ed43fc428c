"""Kernels that only benchmarks have: `kernels/` beside this file, over headers of the package."""

from __future__ import annotations

import functools
from pathlib import Path

from dak_inductor.cuda_runtime.kernel import LoadedKernel, architecture
from dak_inductor.cuda_runtime.nvrtc import Compiler, KernelInstance
from dak_inductor.options import cache_folder

KERNELS = Path(__file__).resolve().parent / "kernels"


@functools.cache
def loaded(kernel: KernelInstance, device_index: int) -> LoadedKernel:
    """`kernel` on that device, compiled at the first call. Raises as `cuda_runtime.kernel.load`."""
    cubin = _compiler().cubin(kernel, architecture=architecture(device_index))
    return LoadedKernel(cubin, device_index)


@functools.cache
def _compiler() -> Compiler:
    return Compiler(cache_folder() / "cubins", kernels=KERNELS)
