"""Products of a step on the simulated tier, for tests of copies ahead without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dak_inductor import copy_ring
from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.simulated import SimulatedTier
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.lowering.ahead import staged_plans
from dak_inductor.lowering.linear import dispatch
from dak_inductor.lowering.linear.product import Product

ROOM = 24 * 1024
BF16 = torch.bfloat16


def shrink(monkeypatch) -> None:
    """Rings so small that little weights take many turns."""
    monkeypatch.setattr(copy_ring, "LEAST_RING_BYTES", 1024)
    monkeypatch.setattr(copy_ring, "RING_BYTES", ROOM)
    monkeypatch.setattr(staged_plans, "LEAST_REMOTE_BYTES", 0)


def weight_of(n: int, k: int, remote_share: float, label: str = "w") -> tuple[TieredBuffer, Tensor]:
    """Random values of which the last are remote; the split cuts a row."""
    values = torch.randn(n, k, dtype=BF16) / 8
    split = round((1 - remote_share) * values.nbytes) // 2 * 2
    buffer = SimulatedTier(page_bytes=256).allocate(values.nbytes, split=split)
    buffer.label = label
    tensor = buffer.tensor(BF16, (n, k))
    tensor.copy_(values)
    return buffer, tensor


@dataclass(frozen=True)
class Layer:
    """activation(x W^T) (* (x up^T)) + residual."""

    weights: tuple[Tensor, ...]
    activation: str = "none"
    residual: bool = False
    layout: str = "out_in"

    def product(self, x: Tensor) -> Product:
        buffers = tuple(address_table.lookup(weight.data_ptr()) for weight in self.weights)
        residual = x[..., :1].expand(self.shape(x)).contiguous() if self.residual else None
        none = (None,) * len(self.weights)
        return Product(x, self.weights, buffers, none, residual, self.activation, self.layout)

    def shape(self, x: Tensor) -> tuple[int, ...]:
        return (*x.shape[:-1], self.weights[0].shape[0 if self.layout == "out_in" else 1])

    def expected(self, x: Tensor) -> Tensor:
        """By torch, in fp32."""
        product = self.product(x)
        of = [w.t() if self.layout == "out_in" else w for w in self.weights]
        y = [x.float() @ w.float() for w in of]
        result = torch.nn.functional.silu(y[0]) if self.activation == "silu" else y[0]
        result = result * y[1] if len(y) == 2 else result
        return result if product.residual is None else result + product.residual.float()

    def __call__(self, x: Tensor) -> Tensor | None:
        """As a dak:: operator calls it; None where the stock operator is to run."""
        product = self.product(x)
        return dispatch.run(
            x,
            self.weights,
            biases=product.biases,
            residual=product.residual,
            activation=self.activation,
            layout=self.layout,
        )


def assert_close(result: Tensor | None, expected: Tensor) -> None:
    assert result is not None
    torch.testing.assert_close(result.float(), expected, rtol=3e-2, atol=3e-2)
