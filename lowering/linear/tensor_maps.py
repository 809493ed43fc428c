"""Tensor maps: how the copy units of an SM find boxes of a matrix."""

from __future__ import annotations

from functools import lru_cache

import torch

from dak_inductor.cuda_runtime.nvrtc import extension

# cuda.h: CUtensorMapDataType, CUtensorMapSwizzle, CUtensorMapL2promotion
_DATA_TYPES = {torch.float16: 6, torch.bfloat16: 9}
_SWIZZLE_128B = 3
_L2_PROMOTION_128B, _L2_PROMOTION_256B = 2, 3
_MAXIMUM_STRIDE = 1 << 40

BOX_COLUMNS = 64  # 128 bytes, as wide as the swizzle
ALIGNMENT = 16


@lru_cache(maxsize=16384)
def matrix_map(
    address: int,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    row_bytes: int,
    box_rows: int,
    wide: bool = True,
) -> bytes:
    """The map of a row-major matrix in boxes of `box_rows` x 64 elements, swizzled by 128 bytes.

    What is read fills L2 lines of 256 bytes where `wide`, else of 128. Where one CTA of an SM reads
    boxes of 128 rows, 470 MB stream at 4263 and 4315 GB/s with 128 and at 4179 and 4228 with 256
    (rows of 16 and 56 KiB, H200); where two share an SM, wide lines are 0.5% faster.

    It holds address and sizes only: pages may move under it. `refusal` must have found none.
    """
    encoded: bytes = extension().encode_tensor_map(
        address=address,
        data_type=_DATA_TYPES[dtype],
        shape=[columns, rows],
        strides=[row_bytes],
        box=[BOX_COLUMNS, box_rows],
        swizzle=_SWIZZLE_128B,
        l2_promotion=_L2_PROMOTION_256B if wide else _L2_PROMOTION_128B,
    )
    return encoded


def refusal(matrix: torch.Tensor) -> str | None:
    """Why no tensor map can describe this 2-D matrix; None where one can."""
    row_bytes = matrix.stride(0) * matrix.element_size()
    if matrix.stride(1) != 1 and matrix.shape[1] != 1:
        return "its rows are not contiguous"
    if matrix.data_ptr() % ALIGNMENT:
        return f"it starts at an address that is no multiple of {ALIGNMENT} bytes"
    if matrix.shape[0] > 1 and (row_bytes % ALIGNMENT or not 0 < row_bytes < _MAXIMUM_STRIDE):
        return f"its rows are {row_bytes} bytes apart; a multiple of {ALIGNMENT} is needed"
    return None
