"""Other ways to run one attention: torch's own on resident and on split caches, and copies.

All run a round: one call on each of several equal caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from dak_inductor.benchmarks.harness.copy_stream import CopyStream, remote_copy
from dak_inductor.benchmarks.harness.rounds import Round

Cache = tuple[Tensor, Tensor]
"""Keys and values [B, Hkv, S, D]."""

CHOICES = ("none", "fast", "all")
STOCK = "sdpa on split"
OFFLOADED = "offloaded layers"
MOST_OFFLOADED_BYTES = 4 << 30
BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)


@dataclass(frozen=True, slots=True)
class StockAttention:
    """torch's attention for the queries at the end of a cache, by one backend (None: any).

    `packed`: query heads that share a head of keys become queries of that head. Only for one query
    each, which sees all tokens.
    """

    backend: SDPBackend | None = None
    packed: bool = False

    @property
    def name(self) -> str:
        backend = "any" if self.backend is None else self.backend.name.lower()
        return f"{backend}, packed" if self.packed else backend

    def __call__(self, query: Tensor, cache: Cache) -> Tensor:
        key, value = cache
        if self.backend is None:
            return self._run(query, key, value)
        with sdpa_kernel(self.backend):
            return self._run(query, key, value)

    def _run(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, queries, head_dim = query.shape
        kv_heads, tokens = key.shape[1], key.shape[2]
        if self.packed:
            grouped = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
            result = functional.scaled_dot_product_attention(grouped, key, value)
            return result.reshape(batch, heads, 1, head_dim)
        whole = queries == tokens
        mask = None if whole or queries == 1 else _own_tokens(queries, tokens, query.device)
        return functional.scaled_dot_product_attention(
            query, key, value, mask, is_causal=whole, enable_gqa=heads != kv_heads
        )


@lru_cache(maxsize=8)
def _own_tokens(queries: int, tokens: int, device: torch.device) -> Tensor:
    """What the last queries see; made once, before a capture."""
    seen = torch.ones(queries, tokens, dtype=torch.bool, device=device)
    return seen.tril(tokens - queries)


def stock_variants(query: Tensor, kv_heads: int) -> list[StockAttention]:
    """What may be the fastest for a query [B, Hq, Q, D]; not each runs on each machine."""
    if not query.is_cuda:
        return [StockAttention()]
    made = [StockAttention(), *(StockAttention(backend) for backend in BACKENDS)]
    if query.shape[2] == 1 and query.shape[1] > kv_heads:
        made += [StockAttention(backend, packed=True) for backend in BACKENDS]
    return made


def chosen(peers: str, fraction: float, cache_bytes: int) -> tuple[str, ...]:
    """Peers of a cell. "fast" leaves out copies; so do caches too large to hold several times."""
    if peers == "none" or fraction == 0:
        return ()
    if peers == "fast" or cache_bytes > MOST_OFFLOADED_BYTES:
        return (STOCK,)
    return (STOCK, OFFLOADED)


def attention_round(
    attend: Callable[[Tensor, Cache], Tensor], query: Tensor, caches: Sequence[Cache]
) -> Round:
    """`attend` on each cache in turn; returns the last output."""

    def run() -> Tensor:
        output = query
        for cache in caches:
            output = attend(query, cache)
        return output

    return run


class OffloadedLayers:
    """Caches that lie in the remote tier whole and are copied before use, one ahead, to two slots.

    What transformers' offloaded caches do, recorded into a CUDA graph.
    """

    def __init__(self, caches: Sequence[Cache], remote: str) -> None:
        self._sources = [tuple(remote_copy(part, remote) for part in cache) for cache in caches]
        self._slots = [tuple(torch.empty_like(part) for part in caches[0]) for _ in range(2)]
        self._stream = CopyStream(caches[0][0].device, remote)

    def round(self, attend: StockAttention, query: Tensor) -> Round:
        def run() -> Tensor:
            self._stream.fork()
            output = query
            used: list[torch.cuda.Event | None] = [None, None]
            for index, source in enumerate(self._sources):
                slot = self._slots[index % 2]
                self._stream.hold(used[index % 2])
                for target, part in zip(slot, source, strict=True):
                    self._stream.copy(target, part)
                self._stream.wait(self._stream.copied())
                output = attend(query, (slot[0], slot[1]))
                used[index % 2] = self._stream.used()
            self._stream.join()
            return output

        return run
