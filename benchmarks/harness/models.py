"""Decoder blocks at the shapes of Llama 3 8B in plain torch, with a static KV cache.

Random weights; the same seed on the same kind of device gives the same model, so every peer
builds its own copy and none sees what another did to its weights. The cache is an input, not part
of the model: the remote fraction is one of weights alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from dak_inductor.benchmarks.harness.yardstick import Work

LINEAR_NAMES = ("q", "k", "v", "o", "gate", "up", "down")
"""The linears of a block in the order in which a step reads them."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder, in elements."""

    layers: int = 8
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    intermediate: int = 14336

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """[out, in] of each linear of a block."""
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q": (query, self.hidden),
            "k": (kv, self.hidden),
            "v": (kv, self.hidden),
            "o": (self.hidden, query),
            "gate": (self.intermediate, self.hidden),
            "up": (self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }

    @property
    def layer_elements(self) -> int:
        return sum(rows * columns for rows, columns in self.linear_shapes().values())

    @property
    def linear_elements(self) -> int:
        return self.layers * self.layer_elements


LLAMA3_8B = Shape()
LLAMA3_70B = Shape(hidden=8192, heads=64, intermediate=28672)
TINY = Shape(layers=4, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=128)
SHAPES = {"llama3-8b": LLAMA3_8B, "llama3-70b": LLAMA3_70B, "tiny": TINY}


@dataclass(slots=True)
class StepInputs:
    """Inputs of one step at fixed positions; the cache is written in place.

    hidden [batch, tokens, hidden]; cosine, sine [tokens, head_dim]; keys, values per layer
    [batch, kv_heads, context, head_dim]; position [tokens], the cache rows this step writes, the
    last ones. A step of several tokens is a prefill: it writes all rows.
    """

    hidden: Tensor
    cosine: Tensor
    sine: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    position: Tensor

    def arguments(self) -> tuple[object, ...]:
        """In the order of `DecoderBlocks.forward`."""
        return self.hidden, self.cosine, self.sine, self.keys, self.values, self.position

    def to(self, dtype: torch.dtype) -> StepInputs:
        """A copy in another dtype (for the fp32 reference)."""
        return StepInputs(
            self.hidden.to(dtype, copy=True),
            self.cosine.to(dtype),
            self.sine.to(dtype),
            [key.to(dtype, copy=True) for key in self.keys],
            [value.to(dtype, copy=True) for value in self.values],
            self.position,
        )


class Normalisation(nn.Module):
    """Root-mean-square normalisation over the last dimension."""

    def __init__(self, hidden: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden, device=device, dtype=dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.rms_norm(hidden, self.weight.shape, self.weight, 1e-5)


class Block(nn.Module):
    """One decoder block: attention over the cache, then the gated MLP."""

    def __init__(self, shape: Shape, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        self.attention_norm = Normalisation(shape.hidden, device=device, dtype=dtype)
        self.mlp_norm = Normalisation(shape.hidden, device=device, dtype=dtype)
        made = {
            name: _linear(rows, columns, device=device, dtype=dtype)
            for name, (rows, columns) in shape.linear_shapes().items()
        }
        self.q, self.k, self.v, self.o = made["q"], made["k"], made["v"], made["o"]
        self.gate, self.up, self.down = made["gate"], made["up"], made["down"]

    def forward(
        self,
        hidden: Tensor,
        cosine: Tensor,
        sine: Tensor,
        keys: Tensor,
        values: Tensor,
        position: Tensor,
    ) -> Tensor:
        shape, (batch, length, _) = self.shape, hidden.shape
        normed = self.attention_norm(hidden)
        query = self.q(normed).view(batch, length, shape.heads, shape.head_dim).transpose(1, 2)
        key = self.k(normed).view(batch, length, shape.kv_heads, shape.head_dim).transpose(1, 2)
        value = self.v(normed).view(batch, length, shape.kv_heads, shape.head_dim).transpose(1, 2)
        keys.index_copy_(2, position, rotate(key, cosine, sine))
        values.index_copy_(2, position, value)
        attended = functional.scaled_dot_product_attention(
            rotate(query, cosine, sine),
            keys,
            values,
            is_causal=length > 1,
            enable_gqa=shape.heads != shape.kv_heads,
        )
        hidden = hidden + self.o(attended.transpose(1, 2).reshape(batch, length, -1))
        normed = self.mlp_norm(hidden)
        return hidden + self.down(functional.silu(self.gate(normed)) * self.up(normed))


class DecoderBlocks(nn.Module):
    """A stack of blocks: what a decode step spends its time in, without embedding and head."""

    def __init__(self, shape: Shape, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        self.layers = nn.ModuleList(
            Block(shape, device=device, dtype=dtype) for _ in range(shape.layers)
        )

    def forward(
        self,
        hidden: Tensor,
        cosine: Tensor,
        sine: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        position: Tensor,
    ) -> Tensor:
        for index, block in enumerate(self.layers):
            hidden = block(hidden, cosine, sine, keys[index], values[index], position)
        return hidden

    def linears(self) -> Iterator[tuple[int, str, nn.Linear]]:
        """(layer, name, module) of every linear in the order in which a step reads them."""
        for index, block in enumerate(self.layers):
            for name in LINEAR_NAMES:
                linear = block.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                yield index, name, linear


def _linear(rows: int, columns: int, *, device: torch.device, dtype: torch.dtype) -> nn.Linear:
    """A linear without bias whose weight is left undefined: `Workload.build` draws it."""
    linear = nn.Linear(columns, rows, bias=False, device="meta", dtype=dtype)
    linear.weight = nn.Parameter(torch.empty(rows, columns, device=device, dtype=dtype))
    return linear


def rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of [batch, heads, length, head_dim]; cosine, sine [length, head_dim]."""
    first, second = states.chunk(2, dim=-1)
    return states * cosine + torch.cat((-second, first), dim=-1) * sine


@dataclass(frozen=True, slots=True)
class Workload:
    """A step to time: shape, batch, context, dtype and the seed of weights and inputs.

    A decode step, or with `prefill` one of all `context` tokens of each sequence.
    """

    shape: Shape = LLAMA3_8B
    batch: int = 1
    context: int = 512
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    prefill: bool = False

    @property
    def tokens(self) -> int:
        """Of each sequence in a step."""
        return self.context if self.prefill else 1

    def with_layers(self, layers: int) -> Workload:
        return replace(self, shape=replace(self.shape, layers=layers))

    def build(self, device: torch.device) -> DecoderBlocks:
        """A frozen model with weights drawn on `device` (on meta: without values)."""
        model = DecoderBlocks(self.shape, device=device, dtype=self.dtype).eval()
        model.requires_grad_(False)
        if device.type != "meta":
            generator = torch.Generator(device).manual_seed(self.seed)
            for _, _, linear in model.linears():
                deviation = 1 / math.sqrt(linear.in_features)
                linear.weight.normal_(0, deviation, generator=generator)
        return model

    def inputs(self, device: torch.device, seed: int = 1) -> StepInputs:
        """Fresh random inputs and a cache filled with random keys and values (on meta: none)."""
        on_meta = device.type == "meta"
        generator = None if on_meta else torch.Generator(device).manual_seed(seed)
        shape = self.shape

        def draw(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator, device=device, dtype=self.dtype)

        cache = (self.batch, shape.kv_heads, self.context, shape.head_dim)
        position = torch.arange(self.context - self.tokens, self.context, device=device)
        half = shape.head_dim // 2
        frequencies = 500_000.0 ** -(torch.arange(half, device=device, dtype=torch.float32) / half)
        angles = torch.outer(position.float(), torch.cat((frequencies, frequencies)))
        return StepInputs(
            hidden=draw(self.batch, self.tokens, shape.hidden),
            cosine=angles.cos().to(self.dtype),
            sine=angles.sin().to(self.dtype),
            keys=[draw(*cache) for _ in range(shape.layers)],
            values=[draw(*cache) for _ in range(shape.layers)],
            position=position,
        )

    @property
    def linear_bytes(self) -> int:
        """Bytes of all eligible weights."""
        return self.shape.linear_elements * self.dtype.itemsize

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that one step reads."""
        shape = self.shape
        per_layer = 2 * self.batch * shape.kv_heads * self.context * shape.head_dim
        return shape.layers * per_layer * self.dtype.itemsize

    def work(self, remote_bytes: int) -> Work:
        """What one step must move and compute when `remote_bytes` of the weights are remote."""
        tokens = self.batch * self.tokens
        attention = 4 * tokens * self.shape.heads * self.shape.head_dim * self.context
        if self.prefill:
            attention //= 2  # causal
        return Work(
            local_bytes=self.linear_bytes - remote_bytes + self.cache_bytes,
            remote_bytes=remote_bytes,
            flops=2 * tokens * self.shape.linear_elements + self.shape.layers * attention,
        )
