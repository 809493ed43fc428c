"""One call of a dak operator on tiered weights, with the same call on resident copies beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dak_inductor.benchmarks.harness.accuracy import AccuracyVerdict
from dak_inductor.benchmarks.harness.linear_reference import (
    LinearCall,
    make_reference,
    poison_free_memory,
)
from dak_inductor.benchmarks.harness.linear_weights import LABEL
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.tier_bytes import TierBytes

Gating = Literal["none", "separate", "fused"]
OperatorName = Literal["linear", "addmm", "matmul", "linear_epilogue", "gated_linear"]

SPLITS = ("all local", "all remote", "page", "rows", "in a row", "last bytes", "first bytes")
_PAGE = 2 << 20


@dataclass(frozen=True, slots=True)
class CallSpec:
    """Sizes and kinds of a call: y [M, N] of x [M, K].

    `splits` are the local bytes of each weight's buffer; the last one serves what remains.
    """

    m: int
    n: int
    k: int
    dtype: torch.dtype = torch.bfloat16
    operator: OperatorName = "linear"
    layout: str = "out_in"
    gating: Gating = "none"
    activation: str = "none"
    bias: bool = False
    residual: bool = False
    splits: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True)
class LinearCase:
    """A call on tiered weights and the same on resident ones; it owns the buffers."""

    problem: CallSpec
    tiered: LinearCall
    resident: LinearCall
    buffers: tuple[TieredBuffer, ...]

    @property
    def bytes_by_tier(self) -> TierBytes:
        """Weight bytes by tier, all buffers."""
        return sum((buffer.bytes_by_tier() for buffer in self.buffers), TierBytes())

    def run(self) -> Tensor:
        """The operator on the tiered weights."""
        return run_operator(self.problem.operator, self.tiered)

    def check(self) -> AccuracyVerdict:
        """Run it into poisoned memory, and judge the output against fp32."""
        nbytes = self.problem.m * self.problem.n * self.problem.dtype.itemsize
        reference = make_reference(self.resident)
        if self.tiered.x.is_cuda:
            poison_free_memory(nbytes, self.tiered.x.device)
        return reference.judge(self.run())


def run_operator(operator: OperatorName, call: LinearCall) -> Tensor:
    """A dak operator on the operands of a call. Raises ValueError for one it cannot express."""
    ops = torch.ops.dak
    weight, bias = call.weights[0], call.biases[0]
    plain = call.activation == "none" and call.residual is None and len(call.weights) == 1
    result: Tensor
    if operator == "gated_linear" and len(call.weights) == 2 and call.residual is None:
        result = ops.gated_linear.default(
            call.x, *call.weights, *call.biases, call.activation, call.layout
        )
    elif operator == "linear_epilogue" and len(call.weights) == 1:
        result = ops.linear_epilogue.default(
            call.x, weight, bias, call.residual, call.activation, call.layout
        )
    elif operator == "linear" and plain and call.layout == "out_in":
        result = ops.linear.default(call.x, weight, bias)
    elif operator == "matmul" and plain and bias is None:
        result = ops.matmul.default(call.x, weight if call.layout == "in_out" else weight.t())
    elif operator == "addmm" and plain and bias is not None:
        result = ops.addmm.default(bias, call.x, weight if call.layout == "in_out" else weight.t())
    else:
        raise ValueError(f"dak::{operator} has no form for {call.layout}, {call.activation}")
    return result


def make_case(problem: CallSpec, tier: Tier, device: torch.device) -> LinearCase:
    """Fresh random operands on `device`, the weights on buffers of `tier`."""
    fused = problem.gating == "fused"
    count = 1 if problem.gating == "none" else 2
    shape = _weight_shape(problem, 2 if fused else 1)
    stored = [
        torch.randn(shape, dtype=problem.dtype, device=device).div_(math.sqrt(problem.k))
        for _ in range(1 if fused else count)
    ]
    buffers, tensors = [], []
    for position, values in enumerate(stored):
        split = problem.splits[min(position, len(problem.splits) - 1)]
        buffer = tier.allocate(values.nbytes, split=split)
        buffer.label = LABEL
        tensors.append(buffer.tensor(values.dtype, tuple(values.shape)).copy_(values))
        buffers.append(buffer)
    x = _random(problem, (problem.m, problem.k), device)
    biases = tuple(
        _random(problem, (problem.n,), device) if problem.bias else None for _ in range(count)
    )
    residual = _random(problem, (problem.m, problem.n), device) if problem.residual else None

    def call(weights: list[Tensor]) -> LinearCall:
        parts = _halves(weights[0], problem) if fused else tuple(weights)
        return LinearCall(x, parts, biases, residual, problem.activation, problem.layout)

    return LinearCase(problem, call(tensors), call(stored), tuple(buffers))


def split_bytes(name: str, rows: int, row_bytes: int) -> int:
    """Local bytes of a weight of `rows` stored rows for a name in `SPLITS`."""
    nbytes = rows * row_bytes
    return {
        "all local": nbytes,
        "all remote": 0,
        "page": max(_PAGE, nbytes * 5 // 8 // _PAGE * _PAGE) if nbytes > _PAGE else nbytes // 2,
        "rows": rows * 3 // 8 * row_bytes + row_bytes * (rows > 8),
        "in a row": rows * 5 // 8 * row_bytes + row_bytes // 2 + 16,
        "last bytes": nbytes - 256,
        "first bytes": 256,
    }[name]


def _weight_shape(problem: CallSpec, parts: int) -> tuple[int, int]:
    if problem.layout == "out_in":
        return parts * problem.n, problem.k
    return problem.k, parts * problem.n


def _halves(weight: Tensor, problem: CallSpec) -> tuple[Tensor, ...]:
    """Gate and up of a fused weight."""
    return tuple(weight.chunk(2, dim=0 if problem.layout == "out_in" else 1))


def _random(problem: CallSpec, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randn(shape, dtype=problem.dtype, device=device)
