"""Stock forwards of attention that also give the log-sum-exp of the scores.

Both take heads in groups (query head h reads key head h // ratio) without repeating keys. With
`causal`, flash lets the last row see the last token; cuDNN aligns at the first ones, so that the
two agree where there are as many rows as tokens.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

from dak_inductor.lowering.attention.staged_parts import Forward
from dak_inductor.lowering.refusals import capability

log = logging.getLogger(__name__)

_HALF = (torch.bfloat16, torch.float16)
_CUDNN_HEAD = 128  # its widest head on every GPU that it serves
_FLASH_HEAD = 256
_CUDNN_VERSION = 90000

_refused: set[tuple[torch.dtype, int, int]] = set()
"""Dtype and head sizes that cuDNN found no plan for."""


def available(query: Tensor, value_dim: int) -> tuple[Forward, ...]:
    """Which forwards serve a query [B, Hq, Q, D] on its device, the user's switches included."""
    head_dim = query.shape[-1]
    if not query.is_cuda or query.dtype not in _HALF or head_dim % 8 or value_dim % 8:
        return ()
    found: list[Forward] = []
    generation = capability(query.device.index)
    fits = max(head_dim, value_dim) <= _CUDNN_HEAD
    refused = (query.dtype, head_dim, value_dim) in _refused
    cuda = torch.backends.cuda
    if generation >= (9, 0) and fits and not refused and cuda.cudnn_sdp_enabled() and _cudnn():
        found.append("cudnn")
    fits = head_dim == value_dim <= _FLASH_HEAD
    flash = cuda.flash_sdp_enabled() and cuda.is_flash_attention_available()
    if generation >= (8, 0) and fits and flash:
        found.append("flash")
    return tuple(found)


def attend(
    forward: Forward, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of all rows to all tokens, or under a causal triangle.

    Args:
        query: [B, Hq, rows, D].
        key, value: [B, Hkv, tokens, D] and [B, Hkv, tokens, Dv], tokens at any distance.

    Returns [B, rows, Hq, Dv] contiguous, and the log-sum-exp [B, Hq, rows] in fp32.
    """
    if forward == "cudnn":
        found = _cudnn_attend(query, key, value, causal, scale)
        if found is not None:
            return found
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention.default(
        query, key, value, 0.0, causal, False, scale=scale
    )
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def _cudnn_attend(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor] | None:
    """None where cuDNN has no plan for these shapes and flash serves them."""
    kind = (query.dtype, query.shape[-1], value.shape[-1])
    if kind in _refused:
        return None
    try:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention.default(
            query, key, value, None, True, 0.0, causal, False, scale=scale
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if kind[1] != kind[2]:
            raise
        _refused.add(kind)
        log.info("flash attention instead of cuDNN's for heads of %d: %s", kind[1], error)
        return None
    return out.transpose(1, 2).contiguous(), lse.reshape(lse.shape[:3])


@lru_cache(maxsize=1)
def _cudnn() -> bool:
    return torch.backends.cudnn.is_available() and (
        (torch.backends.cudnn.version() or 0) >= _CUDNN_VERSION
    )
