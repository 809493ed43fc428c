"""The hardware profile of a GPU, for what is decided at a call."""

from __future__ import annotations

from functools import lru_cache

from dak_inductor import hardware
from dak_inductor.hardware_profile import HardwareProfile


@lru_cache(maxsize=8)
def profile_of(device_index: int) -> HardwareProfile:
    """The profile of the GPU with that index, looked up once: launches ask for it."""
    return hardware.current(device_index)
