"""One attention over a tiered cache, with the same call on resident copies beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dak_inductor.benchmarks.harness.accuracy import AccuracyVerdict
from dak_inductor.benchmarks.harness.attention_reference import AttentionCall, make_reference
from dak_inductor.benchmarks.harness.linear_reference import poison_free_memory
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.tier_bytes import TierBytes

CacheLayout = Literal["token_major", "plain"]
LABEL = "cache"
SPLITS = ("all local", "all remote", "page", "tokens", "in a token", "last bytes", "first bytes")
_PAGE = 2 << 20


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Sizes and kinds of a call: query [batch, kv_heads * ratio, queries, head_dim].

    `layout` is the order in memory: [tokens, batch, kv_heads, head_dim] or as the tensor has it.
    `splits` are the local bytes of keys and values. `lengths` and `starts` of each sequence, or
    None. What no query may read is NaN in keys and values.
    """

    batch: int
    kv_heads: int
    ratio: int
    queries: int
    tokens: int
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    layout: CacheLayout = "token_major"
    splits: tuple[int, int] = (0, 0)
    lengths: tuple[int, ...] | None = None
    starts: tuple[int, ...] | None = None
    causal: bool = True
    window: int = 0
    softcap: float = 0.0

    @property
    def cache_bytes(self) -> int:
        """Of keys, or of values."""
        return self.token_bytes * self.tokens

    @property
    def token_bytes(self) -> int:
        """Keys, or values, of one token of all sequences and heads."""
        return self.batch * self.kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """A call on tiered keys and values and the same on resident ones; it owns the buffers."""

    spec: AttentionSpec
    tiered: AttentionCall
    resident: AttentionCall
    buffers: tuple[TieredBuffer, TieredBuffer]

    def run(self) -> Tensor:
        """The kernel on the tiered cache. Raises RuntimeError where it declines."""
        return run_kernel(self.tiered)

    def check(self) -> AccuracyVerdict:
        """Run it into poisoned memory, and judge the output against fp32."""
        reference = make_reference(self.resident)
        if self.tiered.query.is_cuda:
            poison_free_memory(self.tiered.query.nbytes, self.tiered.query.device)
        return reference.judge(self.run())

    def bytes_read(self, side: int) -> TierBytes:
        """Bytes by tier that one call reads of keys (0) or values (1), by the current split."""
        cache = (self.tiered.key, self.tiered.value)[side]
        buffer = self.buffers[side]
        size = cache.element_size()
        places = torch.full(cache.shape[:3], cache.data_ptr() - buffer.address, dtype=torch.int64)
        for axis in range(3):
            shape = [-1 if axis == other else 1 for other in range(3)]
            steps = torch.arange(cache.shape[axis]) * cache.stride(axis) * size
            places += steps.view(shape)
        row_bytes = cache.shape[3] * size
        read = self.resident.seen().any(2).cpu()  # [B, 1, S]
        local = ((buffer.split - places).clamp(0, row_bytes) * read).sum().item()
        total = int(read.sum()) * cache.shape[1] * row_bytes
        return TierBytes(int(local), total - int(local))


def run_kernel(call: AttentionCall) -> Tensor:
    """`dispatch.run` on a call. Raises RuntimeError where it declines."""
    from dak_inductor.lowering.attention import dispatch

    output = dispatch.run(call.operands())
    if output is None:
        raise RuntimeError(f"the kernel declined a query of {tuple(call.query.shape)}")
    return output


def make_case(spec: AttentionSpec, tier: Tier, device: torch.device) -> AttentionCase:
    """Fresh random operands on `device`, keys and values on buffers of `tier`."""
    shape = (spec.batch, spec.kv_heads, spec.tokens, spec.head_dim)
    query = torch.randn(
        spec.batch, spec.kv_heads * spec.ratio, spec.queries, spec.head_dim,
        dtype=spec.dtype, device=device,
    )  # fmt: skip
    key, value = (torch.randn(shape, dtype=spec.dtype, device=device) for _ in range(2))
    call = AttentionCall(
        query, key, value, _bounds(spec.lengths, device), _bounds(spec.starts, device),
        scale=1 / math.sqrt(spec.head_dim), causal=spec.causal, window=spec.window,
        softcap=spec.softcap,
    )  # fmt: skip
    unread = ~call.seen().any(2)[:, :, :, None]  # [B, 1, S, 1]
    resident = replace(call, key=key.masked_fill(unread, 0.0), value=value.masked_fill(unread, 0.0))
    buffers, views = [], []
    for values, split in zip((key, value), spec.splits, strict=True):
        buffer = tier.allocate(values.nbytes, split=split)
        buffer.label = LABEL
        view = cache_view(buffer, spec)
        views.append(view.copy_(values.masked_fill(unread, math.nan)))
        buffers.append(buffer)
    tiered = replace(call, key=views[0], value=views[1])
    return AttentionCase(spec, tiered, resident, (buffers[0], buffers[1]))


def cache_view(buffer: TieredBuffer, spec: AttentionSpec) -> Tensor:
    """[batch, kv_heads, tokens, head_dim] on a buffer, in the order that the spec has in memory."""
    if spec.layout == "plain":
        return buffer.tensor(spec.dtype, (spec.batch, spec.kv_heads, spec.tokens, spec.head_dim))
    stored = (spec.tokens, spec.batch, spec.kv_heads, spec.head_dim)
    return buffer.tensor(spec.dtype, stored).permute(1, 2, 0, 3)


def split_bytes(name: str, spec: AttentionSpec) -> int:
    """Local bytes of keys, or values, for one of SPLITS."""
    whole, token = spec.cache_bytes, spec.token_bytes
    return {
        "all local": whole,
        "all remote": 0,
        "page": min(whole, _PAGE),
        "tokens": spec.tokens * 5 // 8 * token,
        "in a token": spec.tokens * 5 // 8 * token + token // 2 + 16,
        "last bytes": whole - 256,
        "first bytes": 256,
    }[name]


def _bounds(bounds: tuple[int, ...] | None, device: torch.device) -> Tensor | None:
    return None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=device)
