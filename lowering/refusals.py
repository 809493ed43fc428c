"""What refusals of kernels share: what the GPU is, and each reason said once."""

from __future__ import annotations

import logging
from functools import lru_cache

import torch

HOPPER = (9, 0)
TRITON_LEAST = (8, 0)
"""Of the portable kernels."""


@lru_cache(maxsize=16)
def capability(device_index: int) -> tuple[int, int]:
    """Major and minor compute capability of that GPU."""
    return torch.cuda.get_device_capability(device_index)


@lru_cache(maxsize=1024)
def log_once(log: logging.Logger, message: str, reason: str) -> None:
    """`message` about `reason` at level info; later calls with the same arguments say nothing."""
    log.info(message, reason)
