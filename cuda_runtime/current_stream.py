"""torch's current stream as the driver knows it."""

from __future__ import annotations

import torch

from dak_inductor.cuda_runtime.nvrtc import extension


def current_stream(device_index: int) -> int:
    """The CUstream of torch's current stream on that GPU.

    torch.cuda.current_stream takes 10 us of the host, of the 100 that a launch may take.
    """
    raw: int = torch._C._cuda_getCurrentRawStream(device_index)
    return raw


def current_capture(device: torch.device) -> int:
    """A number of its own for each capture that is open on torch's current stream; 0 for none."""
    if device.type != "cuda":
        return 0
    capture: int = extension().capture_id(current_stream(device.index))
    return capture
