"""Every instance of the kernel that a launch may ask for, for compiling them ahead."""

from __future__ import annotations

from dak_inductor.cuda_runtime.nvrtc import KernelInstance
from dak_inductor.lowering.attention.configuration import configurations


def all_instances() -> tuple[KernelInstance, ...]:
    """Each once: head sizes, teams, both dtypes."""
    return tuple(configuration.kernel() for configuration in configurations())
