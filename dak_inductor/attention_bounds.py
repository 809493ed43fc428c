"""Which tokens of a cache are valid, as a tensor that travels where transformers passes a mask.

transformers makes one mask per step and hands it to every layer; a mask of four dimensions it hands
on unseen. The bounds of the sequences have four dimensions too, are int32, and say by their shape
what they hold, which a trace knows without reading them:

    [1, 1, 1, B]  lengths
    [2, 1, 1, B]  starts and lengths
    [., 2, 1, B]  the same (twice), for layers with a sliding window

Both count in tokens of the keys that the layer sees: `lengths` ends with the query's own tokens,
`starts` is the first token that is not padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Bounds:
    """lengths and starts: int32 [B], starts None where there is no padding."""

    lengths: Tensor
    starts: Tensor | None
    sliding: bool


def bounds_of(mask: Tensor | None) -> Bounds | None:
    """The bounds that a mask argument holds, or None where it is a mask, or there is none."""
    if mask is None or mask.dtype != torch.int32 or mask.dim() != 4:
        return None
    starts = mask[0, 0, 0] if mask.shape[0] == 2 else None
    return Bounds(mask[-1, 0, 0], starts, mask.shape[1] == 2)


def make_bounds(
    batch: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int | Tensor,
    *,
    padding: Tensor | None,
    sliding: bool,
    device: torch.device,
) -> Any:
    """The tensor; None where all tokens up to the query's own are valid and there is no window;
    NotImplemented where padding is not known to be on the left.

    Args:
        q_offset: tokens in the cache before this step.
        kv_offset: position of the first token that the layer sees.
        padding: bool [B, tokens], True for tokens that are not padding; or None.
    """
    starts: Tensor | None = None
    if padding is not None:
        if not _may_look(padding):
            return NotImplemented
        first = padding.shape[1] - padding.sum(-1)
        token = torch.arange(padding.shape[1], device=padding.device)
        if not bool((padding == (token >= first[:, None])).all()):
            return NotImplemented
        if bool(first.any()):
            starts = (first - kv_offset).clamp(min=0).to(device=device, dtype=torch.int32)
    length = q_offset + q_length - kv_offset
    if isinstance(length, int) and length == kv_length and starts is None and not sliding:
        return None
    if isinstance(length, Tensor):
        lengths = length.to(device=device, dtype=torch.int32).reshape(-1).expand(batch)
    else:
        lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    rows = torch.stack([lengths] if starts is None else [starts, lengths])
    return rows[:, None, None, :].repeat(1, 2 if sliding else 1, 1, 1)


def _may_look(padding: Tensor) -> bool:
    """Whether values may be read here: not in a trace, nor while a CUDA graph is captured."""
    if torch.compiler.is_compiling() or padding.device.type == "meta":
        return False
    return padding.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()
