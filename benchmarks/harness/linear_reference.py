"""What a linear with its epilogue must give: torch's own operators, in any precision.

Computed in fp32 it is the reference, in the operands' dtype it is what torch itself would give: a
kernel may err against the former at most twice as much as the latter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from dak_inductor.benchmarks.harness.accuracy import AccuracyVerdict, Errors, errors, judge

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
}

ALL_ONES = 255
"""A byte of which NaN consists in every floating-point dtype."""


@dataclass(frozen=True, slots=True)
class LinearCall:
    """Operands of one call. Two weights are a gated linear (gate, up).

    x [..., K]; weights [N, K] each in layout "out_in", [K, N] in "in_out"; biases [N]; residual of
    the output's shape.
    """

    x: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...] = (None, None)
    residual: Tensor | None = None
    activation: str = "none"
    layout: str = "out_in"

    def to(self, dtype: torch.dtype) -> LinearCall:
        """The same call with every operand cast."""
        return replace(
            self,
            x=self.x.to(dtype),
            weights=tuple(weight.to(dtype) for weight in self.weights),
            biases=tuple(None if bias is None else bias.to(dtype) for bias in self.biases),
            residual=None if self.residual is None else self.residual.to(dtype),
        )

    def stock(self) -> Tensor:
        """torch's own operators, one after the other, in the operands' dtype."""
        products = [
            functional.linear(self.x, weight if self.layout == "out_in" else weight.t(), bias)
            for weight, bias in zip(self.weights, self.biases, strict=False)
        ]
        y = ACTIVATIONS[self.activation](products[0])
        if len(products) == 2:
            y = y * products[1]
        return y if self.residual is None else y + self.residual


@dataclass(frozen=True, slots=True)
class LinearReference:
    """The fp32 result of a call, and the errors of torch's own operators against it."""

    exact: Tensor
    torch_own: Errors

    def judge(self, output: Tensor) -> AccuracyVerdict:
        """Both errors of `output` within twice torch's own; a NaN is an infinite error."""
        return judge(errors(output, self.exact), self.torch_own)


def make_reference(call: LinearCall) -> LinearReference:
    """The reference of a call, computed on its device."""
    exact = call.to(torch.float32).stock()
    return LinearReference(exact, errors(call.stock(), exact))


def poison_free_memory(nbytes: int, device: torch.device, *, blocks: int = 4) -> None:
    """Leave NaN in the free blocks from which the next outputs of `nbytes` are taken.

    An operator allocates its own output: what it fails to write shows as NaN. Several blocks are
    taken at once and given back, since workspaces may come before the output.
    """
    taken = [torch.full((max(1, nbytes),), ALL_ONES, dtype=torch.uint8, device=device)]
    taken += [torch.full_like(taken[0], ALL_ONES) for _ in range(blocks - 1)]
    del taken
