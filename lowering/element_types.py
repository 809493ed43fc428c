"""The types of elements that kernels take."""

from __future__ import annotations

import torch

DTYPES = (torch.bfloat16, torch.float16)
"""Of the CUDA kernels, linear and attention."""
ELEMENT_BYTES = 2
"""Of an element of each of them."""
PORTABLE_DTYPES = (*DTYPES, torch.float32)
"""Of the Triton kernels."""
