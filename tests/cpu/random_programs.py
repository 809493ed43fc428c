"""Random programs of linears, attention, lookups, views and updates, for comparison with eager.

Every value is [BATCH, tokens, WIDTH], so that any step may follow any other. Weights are drawn from
a small pool: they are shared, tied, split anywhere, and sometimes used by nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from dak_inductor.cuda_runtime.simulated import SimulatedTier
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer

BATCH, WIDTH, HIDDEN, ROWS, SLOTS, HEADS = 2, 32, 48, 24, 12, 4


class Pool(nn.Module):
    """What programs read: frozen weights, and a KV cache that they update."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> nn.Parameter:
            values = torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
            return nn.Parameter(values.to(dtype), requires_grad=False)

        self.w0, self.w1 = weight(WIDTH, WIDTH), weight(WIDTH, WIDTH)
        self.tied = self.w0
        self.up, self.gate, self.down = (
            weight(HIDDEN, WIDTH), weight(HIDDEN, WIDTH), weight(WIDTH, HIDDEN),
        )  # fmt: skip
        self.both = weight(2 * WIDTH, WIDTH)
        self.batched = weight(BATCH, WIDTH, WIDTH)
        self.bias, self.table = weight(WIDTH), weight(ROWS, WIDTH)
        for name, heads in (("keys", HEADS), ("values", HEADS), ("few", HEADS // 2)):
            cache = weight(BATCH, heads, SLOTS, WIDTH // HEADS).data
            self.register_buffer(name, cache)

    def square(self, choice: int) -> Tensor:
        return (self.w0, self.w1, self.tied)[choice % 3]


class Inputs(NamedTuple):
    """What a program is called with: x [BATCH, tokens, WIDTH], ids [BATCH, tokens], positions
    [tokens] in the cache."""

    x: Tensor
    ids: Tensor
    positions: Tensor

    def clone(self) -> Inputs:
        return Inputs(*(tensor.clone() for tensor in self))

    def to(self, device: torch.device | str) -> Inputs:
        return Inputs(*(tensor.to(device) for tensor in self))

    def double(self) -> Inputs:
        return self._replace(x=self.x.double())


Step = Callable[[Pool, Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""(pool, value, another, ids, positions, choice) -> the next value."""


def _heads(x: Tensor, count: int = HEADS) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], -1, WIDTH // HEADS)[:, :, :count].transpose(1, 2)


def _merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], -1, WIDTH)


def _visible(positions: Tensor) -> Tensor:
    return torch.arange(SLOTS, device=positions.device) <= positions[:, None]


def _writable(x: Tensor) -> Tensor:
    """`x`, or a copy of an expanded one, which cannot be written."""
    return x.clone() if 0 in x.stride() else x


def _addmm(p: Pool, v: Tensor, u: Tensor, ids: Tensor, at: Tensor, k: int) -> Tensor:
    rows = v.reshape(-1, WIDTH)
    if k % 3 == 0:
        return torch.addmm(p.bias, rows, p.square(k), beta=0.5, alpha=2.0).view(v.shape)
    return torch.addmm(p.bias, rows, p.square(k).t()).view(v.shape)


def _mlp(p: Pool, v: Tensor, u: Tensor, ids: Tensor, at: Tensor, k: int) -> Tensor:
    act = (F.silu, F.gelu, F.relu, lambda y: F.gelu(y, approximate="tanh"))[k % 4]
    return u + F.linear(act(F.linear(v, p.gate)) * F.linear(v, p.up), p.down, p.bias)


def _halves(p: Pool, v: Tensor, u: Tensor, ids: Tensor, at: Tensor, k: int) -> Tensor:
    both = F.linear(v, p.both)
    if k % 3 == 0:
        gate, up = both.chunk(2, dim=-1)
    elif k % 3 == 1:
        gate, up = both[..., :WIDTH], both[..., WIDTH:]
    else:
        up, gate = both.split(WIDTH, dim=-1)
    return F.silu(gate) * up


def _epilogue(p: Pool, v: Tensor, u: Tensor, ids: Tensor, at: Tensor, k: int) -> Tensor:
    y = F.linear(v, p.square(k), p.bias if k % 2 else None)
    if k % 3 == 0:
        return y.add_(u)
    return u + F.dropout(y, 0.1, training=False) if k % 3 == 1 else F.silu(y) + u


def _overtaken(p: Pool, v: Tensor, u: Tensor, ids: Tensor, at: Tensor, k: int) -> Tensor:
    """What a product read is written before its epilogue stands."""
    y = F.linear(v, p.square(k))
    (p.square(k) if k % 2 else _writable(v)).mul_(0.5)
    return F.silu(y) + u


def _update(p: Pool, v: Tensor, u: Tensor, ids: Tensor, at: Tensor, k: int) -> Tensor:
    (_writable(v) if k % 2 else p.square(k)).mul_(0.75)
    return v @ p.square(k)


def _lookup(p: Pool, v: Tensor, u: Tensor, ids: Tensor, at: Tensor, k: int) -> Tensor:
    if k % 5 == 0:
        return F.embedding(ids, p.table) + v
    if k % 5 == 1:
        return p.table[ids] + v
    if k % 5 == 2:
        return p.table.index_select(0, ids.reshape(-1)).view(v.shape) * v
    if k % 5 == 3:
        return p.table.index_select(0, ids[0, 0])[:, None] + v  # the index has no dimensions
    return p.table[ids - ROWS] + v


def _cached(p: Pool, v: Tensor, u: Tensor, ids: Tensor, at: Tensor, k: int) -> Tensor:
    """Attention over a cache that the step writes to, before or after it is read."""
    query = _heads(F.linear(v, p.square(k)))
    few = k % 4 == 3
    keys, values = (p.few, p.few) if few else (p.keys, p.values)
    if k % 5:
        keys.index_copy_(2, at, _heads(u, keys.shape[1]))
        values[:, :, at] = _heads(v, values.shape[1])
    if few:
        keys, values = (c.repeat_interleave(2, dim=1) for c in (keys, values))
    if k % 2:
        y = F.scaled_dot_product_attention(query, keys, values, attn_mask=_visible(at))
    else:
        scores = query @ keys.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5
        hidden = torch.where(_visible(at), 0.0, -1e4).to(v.dtype)
        y = torch.softmax(scores + hidden, -1, dtype=torch.float32).to(v.dtype) @ values
    return _merged(y) + v


def _attention(p: Pool, v: Tensor, u: Tensor, ids: Tensor, at: Tensor, k: int) -> Tensor:
    y = F.scaled_dot_product_attention(_heads(v), _heads(u), _heads(u), is_causal=bool(k % 2))
    return _merged(y)


def _view(p: Pool, v: Tensor, u: Tensor, ids: Tensor, at: Tensor, k: int) -> Tensor:
    if k % 5 == 0:
        return v.transpose(0, 1).contiguous().transpose(0, 1)
    if k % 5 == 1:
        return v.reshape(-1, WIDTH).unsqueeze(0).view(v.shape)
    if k % 5 == 2:
        return torch.cat((v[..., WIDTH // 2 :], u[..., : WIDTH // 2]), -1)
    return v.detach() if k % 5 == 3 else v[:1].expand(BATCH, -1, -1)


def _sliced_weight(p: Pool, v: Tensor, u: Tensor, ids: Tensor, at: Tensor, k: int) -> Tensor:
    if k % 3 == 0:
        return F.linear(v, p.both[WIDTH // 2 : WIDTH // 2 + WIDTH])
    if k % 3 == 1:
        return F.pad(F.linear(v, p.up[::2]), (0, WIDTH - HIDDEN // 2))
    return torch.cat((F.linear(v[..., ::2], p.w0[:8, ::2]), v[..., 8:]), -1)


STEPS: dict[str, Step] = {
    "linear": lambda p, v, u, ids, at, k: F.linear(v, p.square(k), p.bias if k % 2 else None),
    "matmul": lambda p, v, u, ids, at, k: v @ (p.square(k) if k % 2 else p.square(k).mT),
    "left": lambda p, v, u, ids, at, k: (p.square(k) @ v.mT).mT,
    "bmm": lambda p, v, u, ids, at, k: torch.bmm(v, p.batched if k % 2 else p.batched.mT),
    "vector": lambda p, v, u, ids, at, k: v * (v @ p.bias)[..., None],
    "addmm": _addmm,
    "mlp": _mlp,
    "halves": _halves,
    "epilogue": _epilogue,
    "overtaken": _overtaken,
    "update": _update,
    "lookup": _lookup,
    "cached": _cached,
    "attention": _attention,
    "view": _view,
    "sliced weight": _sliced_weight,
    "add": lambda p, v, u, ids, at, k: v + u if k % 2 else _writable(v).add_(u * 0.5),
    "multiply": lambda p, v, u, ids, at, k: v * torch.sigmoid(u),
    "stock weight": lambda p, v, u, ids, at, k: v * p.square(k).sum(0),
}


@dataclass(frozen=True)
class Program:
    """Steps as (name, operand, other operand, choice); the last `outputs` values are returned."""

    steps: tuple[tuple[str, int, int, int], ...]
    outputs: int

    def __call__(self, pool: Pool, x: Tensor, ids: Tensor, positions: Tensor) -> list[Tensor]:
        values = [x]
        for name, one, other, choice in self.steps:
            v, u = values[-1 - one % len(values)], values[-1 - other % len(values)]
            values.append(STEPS[name](pool, v, u, ids, positions, choice))
        return values[-self.outputs :]


def programs(max_steps: int = 6) -> st.SearchStrategy[Program]:
    """Any program."""
    small = st.integers(0, 4)
    step = st.tuples(st.sampled_from(sorted(STEPS)), small, small, st.integers(0, 59))
    steps = st.lists(step, min_size=1, max_size=max_steps).map(tuple)
    return st.builds(Program, steps, st.integers(1, 3))


def inputs(tokens: int, dtype: torch.dtype, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, tokens, WIDTH, generator=generator).to(dtype)
    ids = torch.randint(ROWS, (BATCH, tokens), generator=generator)
    return Inputs(x, ids, torch.randperm(SLOTS, generator=generator)[:tokens].sort()[0])


def tier(pool: Pool, shares: list[float], own: Tier | None = None) -> dict[str, TieredBuffer]:
    """Put every tensor of `pool` into a tier, with that share of each on the GPU."""
    own = own or SimulatedTier(page_bytes=256)
    buffers: dict[str, TieredBuffer] = {}
    named = [*pool.named_parameters(), *pool.named_buffers()]
    for (name, tensor), share in zip(named, shares, strict=False):
        buffer = own.allocate(tensor.nbytes, split=int(share * tensor.nbytes))
        buffer.label = name
        held = buffer.tensor(tensor.dtype, tuple(tensor.shape))
        held.copy_(tensor)
        tensor.data = held
        buffers[name] = buffer
    return buffers


TENSORS = len([*Pool(torch.float32, 0).parameters(), *Pool(torch.float32, 0).buffers()])
