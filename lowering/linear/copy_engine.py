"""Copies of matrices by a copy engine.

torch copies matrices of different strides with a kernel, and reads of remote memory by a kernel
without a window starve those of HBM.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dak_inductor.cuda_runtime.nvrtc import extension
from dak_inductor.errors import DriverError

_UNIFIED = 4  # CU_MEMORYTYPE_UNIFIED: the driver finds out by the address


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D of cuda.h."""

    _fields_ = (
        ("source_x", ctypes.c_size_t),
        ("source_y", ctypes.c_size_t),
        ("source_type", ctypes.c_int),
        ("source_host", ctypes.c_void_p),
        ("source", ctypes.c_uint64),
        ("source_array", ctypes.c_void_p),
        ("source_pitch", ctypes.c_size_t),
        ("target_x", ctypes.c_size_t),
        ("target_y", ctypes.c_size_t),
        ("target_type", ctypes.c_int),
        ("target_host", ctypes.c_void_p),
        ("target", ctypes.c_uint64),
        ("target_array", ctypes.c_void_p),
        ("target_pitch", ctypes.c_size_t),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    )


def copy(target: Tensor, source: Tensor, stream: int) -> None:
    """Copy a matrix, rows contiguous on both sides, on `stream`: a CUstream of the device that both
    report.

    Wherever the pages of either lie. Raises DriverError.
    """
    if target.device.type == "cpu":
        target.copy_(source)
        return
    if target.is_contiguous() and source.is_contiguous():
        copy_bytes(target.data_ptr(), source.data_ptr(), source.nbytes, target.device, stream)
        return
    size = source.element_size()
    parameters = _Copy2D(
        source_type=_UNIFIED,
        source=source.data_ptr(),
        source_pitch=source.stride(0) * size,
        target_type=_UNIFIED,
        target=target.data_ptr(),
        target_pitch=target.stride(0) * size,
        width=source.shape[1] * size,
        height=source.shape[0],
    )
    with torch.cuda.device(target.device):
        status = _driver().cuMemcpy2DAsync_v2(ctypes.byref(parameters), ctypes.c_void_p(stream))
    if status:
        raise DriverError(
            f"cuMemcpy2DAsync of {tuple(source.shape)}, rows {source.stride(0) * size} bytes apart,"
            f" failed with CUresult {status}",
            call="cuMemcpy2DAsync",
            status=status,
        )


def copy_bytes(target: int, source: int, nbytes: int, device: torch.device, stream: int) -> None:
    """Copy bytes between addresses that `device` can read, on `stream` (a CUstream). Raises
    DriverError."""
    if device.type == "cpu":
        ctypes.memmove(target, source, nbytes)
        return
    extension().copy_async(
        destination=target, source=source, nbytes=nbytes, stream=stream, device=device.index
    )


@lru_cache(maxsize=1)
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")
