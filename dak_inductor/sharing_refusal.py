"""Tiered tensors are not sent to another process: neither CUDA IPC nor shared memory fits them.

torch tells `multiprocessing` how to send a tensor through the table that
`multiprocessing.reduction.register` writes. The entries made here look a tensor up before they
leave it to torch's own.
"""

from __future__ import annotations

import functools
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import reduce_tensor

from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.errors import TieredTensorError


@functools.cache
def refuse_sharing() -> None:
    """From now on sending a tiered tensor raises TieredTensorError in the process that sends."""
    for kind in (torch.Tensor, nn.Parameter):
        ForkingPickler.register(kind, reduce_untiered)


def reduce_untiered(tensor: torch.Tensor) -> Any:
    """torch's own reduction of a tensor. Raises TieredTensorError for one on a tiered buffer."""
    buffer = _buffer_of(tensor)
    if buffer is not None:
        raise TieredTensorError(
            f"{buffer.label or 'a tensor'} of {buffer.nbytes} bytes lies in two memories (tier "
            f"{buffer.tier!r}) and cannot be sent to another process: CUDA IPC hands over whole "
            "allocations only, and shared memory would move it out of its tier. Send a copy "
            "(tensor.clone()), or offload the model in the process that runs it."
        )
    return reduce_tensor(tensor)


def _buffer_of(tensor: torch.Tensor) -> TieredBuffer | None:
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # a layout or a subclass without memory of its own
        return None
    return address_table.lookup(address) if address else None
