"""Tensor maps of keys and values: how the copy units of an SM find tokens of one head."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dak_inductor.cuda_runtime.nvrtc import extension
from dak_inductor.lowering.attention.configuration import BOX_TOKENS
from dak_inductor.lowering.element_types import ELEMENT_BYTES

# cuda.h: CUtensorMapDataType, CUtensorMapSwizzle by bytes of a row, CUtensorMapL2promotion by bytes
_DATA_TYPES = {torch.float16: 6, torch.bfloat16: 9}
_SWIZZLES = {32: 1, 64: 2, 128: 3}
_PROMOTIONS = {64: 1, 128: 2}
_WIDE = 64
_LONGEST_STRIDE = 1 << 40
_LARGEST_EXTENT = 1 << 36  # the kernel counts in 32 bits, 16 bytes at a time

ALIGNMENT = 16


def cache_maps(cache: Tensor) -> bytes:
    """All maps of keys or values [B, H, S, D]: panels of 64 columns, then the narrower one behind.

    Each in boxes of 1, 2, 4 and so on to 64 tokens. They hold address and sizes only: pages may
    move under them. `refusal` must have found none.
    """
    batch, heads, tokens, head_dim = cache.shape
    strides = byte_strides(cache)
    return _encoded(cache.data_ptr(), cache.dtype, (head_dim, heads, batch, tokens), strides)


def byte_strides(cache: Tensor) -> tuple[int, int, int]:
    """Bytes from one head, sequence and token to the next; of a single one any number does."""
    row_bytes = cache.shape[3] * ELEMENT_BYTES
    batch, heads, tokens = (
        stride * ELEMENT_BYTES if size > 1 else row_bytes
        for size, stride in zip(cache.shape[:3], cache.stride()[:3], strict=True)
    )
    return heads, batch, tokens


def refusal(cache: Tensor) -> str | None:
    """Why no tensor map can describe keys or values [B, H, S, D]; None where one can."""
    if cache.stride(3) != 1:
        return "the elements of a head are not contiguous"
    if cache.data_ptr() % ALIGNMENT:
        return f"it starts at an address that is no multiple of {ALIGNMENT} bytes"
    strides = byte_strides(cache)
    if any(stride % ALIGNMENT or not 0 < stride < _LONGEST_STRIDE for stride in strides):
        return f"its strides are {strides} bytes; multiples of {ALIGNMENT} above 0 are needed"
    if strides[2] * cache.shape[2] >= _LARGEST_EXTENT:
        return f"its tokens reach over {strides[2] * cache.shape[2]} bytes"
    return None


@lru_cache(maxsize=4096)
def _encoded(
    address: int,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    strides: tuple[int, int, int],
) -> bytes:
    """Of [head_dim, heads, batch, tokens], innermost first; `strides` in bytes, less the first."""
    head_dim = shape[0]
    tail = head_dim % _WIDE or _WIDE  # without a narrower panel its maps are not used
    encode = extension().encode_tensor_map
    return b"".join(
        encode(
            address=address,
            data_type=_DATA_TYPES[dtype],
            shape=list(shape),
            strides=list(strides),
            box=[width, 1, 1, tokens],
            swizzle=_SWIZZLES[width * ELEMENT_BYTES],
            l2_promotion=_promotion(head_dim * ELEMENT_BYTES),
        )
        for width in (_WIDE, tail)
        for tokens in BOX_TOKENS
    )


def _promotion(row_bytes: int) -> int:
    """L2 fetches as much at once as surely belongs to the row of a box, and no more.

    A row of 128 columns is two boxes. With 256 bytes at once each of them brings the whole row:
    half as much again moved between the halves of L2, and decode took 5 to 8% longer (H200).
    """
    whole = [size for size in _PROMOTIONS if row_bytes % size == 0]
    return _PROMOTIONS[max(whole)] if whole else 0
