"""One attention of a few queries over cached keys and values, as the kernel sees it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dak_inductor.lowering.element_types import ELEMENT_BYTES


@dataclass(frozen=True, slots=True)
class AttentionProblem:
    """query [batch, kv_heads * ratio, queries, head_dim] over key, value [batch, kv_heads, tokens,
    head_dim]. `tokens` are those that the caches can hold."""

    batch: int
    kv_heads: int
    ratio: int
    queries: int
    tokens: int
    head_dim: int
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        """Queries that share a head of keys and values."""
        return self.ratio * self.queries

    @property
    def row_bytes(self) -> int:
        """Of the keys, or values, of one token of one head."""
        return self.head_dim * ELEMENT_BYTES

    @property
    def cache_bytes(self) -> int:
        """Of keys and values together."""
        return 2 * self.batch * self.kv_heads * self.tokens * self.row_bytes


@dataclass(frozen=True, slots=True)
class AttentionMasking:
    """Scores and what a query sees, apart from lengths and starts.

    Query i of Q sees token t where t <= length - Q + i (`causal`) and t > length - Q + i - `window`
    (above 0). Scores are `scale` q.k, under `softcap` above 0 softcap * tanh(score / softcap).
    """

    scale: float
    causal: bool = True
    window: int = 0
    softcap: float = 0.0
