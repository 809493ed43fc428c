"""Memory of the extension as torch tensors: DLPack for the bytes, `set_` for shape and dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import dlpack

from dak_inductor.cuda_runtime.nvrtc import extension
from dak_inductor.errors import TierError

_DLPACK_CPU, _DLPACK_CUDA = 1, 2


def bytes_tensor(owner: Any, address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """uint8 tensor over [address, address + nbytes) on `device`, which keeps `owner` alive.

    The owner is released on the reaper's thread, whichever thread drops the last tensor.
    """
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device=device)
    kind = _DLPACK_CUDA if device.type == "cuda" else _DLPACK_CPU
    capsule = extension().export_bytes(owner, address, nbytes, kind, device.index or 0)
    return dlpack.from_dlpack(capsule)


def shaped(
    base: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    stride: tuple[int, ...] | None,
    offset_bytes: int,
) -> torch.Tensor:
    """A tensor on the storage of `base` (uint8, one dimension). Raises TierError if it sticks out.

    Any dtype that torch has, also those DLPack has no name for; not a view in autograd's sense.
    """
    if stride is None:
        stride = torch.empty(shape, dtype=dtype, device="meta").stride()
    if offset_bytes < 0 or offset_bytes % dtype.itemsize:
        raise TierError(
            f"byte offset {offset_bytes} is not a multiple of {dtype.itemsize} ({dtype})"
        )
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    stop = 0 if 0 in shape else offset_bytes + (last + 1) * dtype.itemsize
    if stop > base.numel():
        raise TierError(
            f"shape {shape}, strides {stride}, {dtype} at byte {offset_bytes} ends at byte {stop} "
            f"of a buffer of {base.numel()}"
        )
    return torch.empty(0, dtype=dtype, device=base.device).set_(
        base.untyped_storage(), offset_bytes // dtype.itemsize, shape, stride
    )


def check_source(source: torch.Tensor, offset_bytes: int, nbytes: int) -> None:
    """Raise TierError unless `source` can be written at `offset_bytes` of a buffer of `nbytes`."""
    if not source.is_contiguous() or source.is_meta:
        raise TierError("write() takes a contiguous tensor that has data")
    if offset_bytes < 0 or offset_bytes + source.nbytes > nbytes:
        raise TierError(
            f"{source.nbytes} bytes at {offset_bytes} do not fit a buffer of {nbytes} bytes"
        )


def as_bytes(source: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as a one-dimensional uint8 tensor."""
    return source.detach().reshape(-1).view(torch.uint8)
