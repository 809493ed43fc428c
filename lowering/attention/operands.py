"""The operands of one call of dak::attention, and what they must be, whatever serves them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.lowering.attention.problem import AttentionMasking
from dak_inductor.lowering.element_types import PORTABLE_DTYPES


@dataclass(frozen=True, slots=True)
class AttentionOperands:
    """In the order of the operator's schema, which says what each is (`lowering/ops_attention`).

    query: [B, Hq, Q, D].
    key, value: [B, Hkv, S, D] and [B, Hkv, S, Dv].
    lengths, starts: int32 [B] on the device, or None.
    mask: bool or float, broadcastable to [B, Hq, Q, S], or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    lengths: Tensor | None
    starts: Tensor | None
    mask: Tensor | None
    scale: float
    causal: bool
    window: int
    softcap: float

    @property
    def buffers(self) -> tuple[TieredBuffer | None, TieredBuffer | None]:
        """That hold keys, and values; None: all of them is local."""
        lookup = address_table.lookup
        return lookup(self.key.data_ptr()), lookup(self.value.data_ptr())

    @property
    def masking(self) -> AttentionMasking:
        return AttentionMasking(self.scale, self.causal, self.window, self.softcap)


def refusal(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str | None:
    """Why no kernel that masks by positions takes these operands; None where one may."""
    if mask is not None:
        return "it has a mask of its own"
    if any(tensor.dim() != 4 for tensor in (query, key, value)):
        return "query, key and value are not all of four dimensions"
    if query.dtype not in PORTABLE_DTYPES or any(t.dtype != query.dtype for t in (key, value)):
        return f"its operands are not all bfloat16, float16 or float32 (query is {query.dtype})"
    if any(tensor.device != query.device for tensor in (key, value)):
        return "its operands are on different devices"
    if any(tensor.numel() == 0 for tensor in (query, key, value)):
        return "it has no queries or no tokens"
    if key.shape[:3] != value.shape[:3] or key.shape[0] != query.shape[0]:
        return f"keys {tuple(key.shape)} and values {tuple(value.shape)} do not match the query"
    if key.shape[3] != query.shape[3] or query.shape[1] % key.shape[1]:
        return f"keys {tuple(key.shape)} do not match the query {tuple(query.shape)}"
    return None
