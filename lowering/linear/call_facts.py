"""What the time of a product depends on, and which calls count as the same."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from dak_inductor.lowering.linear.configuration import DECODE_TOKENS, TOKEN_TILES
from dak_inductor.lowering.linear.problem import LinearProblem

_TOKEN_STEP = math.sqrt(2)
_REMOTE_STEP = 1.3


@dataclass(frozen=True, slots=True)
class CallFacts:
    """One call. `remote_bytes` are those of each weight.

    Activation, bias and residual are free in the kernel, and kernels of their own on other ways.
    `in_graph`: it lies between kernels of a compiled graph, where that makes a difference.
    """

    problem: LinearProblem
    remote_bytes: tuple[int, ...]
    tier: str
    device_index: int
    activation: str = "none"
    bias: bool = False
    residual: bool = False
    in_graph: bool = False

    @property
    def remote_share(self) -> float:
        return sum(self.remote_bytes) / self.problem.weight_bytes

    def __str__(self) -> str:
        problem = self.problem
        parts = [
            f"{problem.n}x{problem.k}",
            "[in, out]" if problem.in_out else "[out, in]",
            str(problem.dtype).removeprefix("torch."),
            *(["gated"] if problem.gated else []),
            *([self.activation] if self.activation != "none" else []),
            *(["bias"] if self.bias else []),
            *(["residual"] if self.residual else []),
        ]
        where = f"cuda:{self.device_index} and {self.tier}"
        return f"{' '.join(parts)}, M={problem.m}, {self.remote_share:.2%} remote, {where}"


@lru_cache(maxsize=4096)
def kind_of(facts: CallFacts) -> CallFacts:
    """The call that stands for all that take about as long: tokens and the sum of remote bytes
    rounded up to steps."""
    remote = remote_step(sum(facts.remote_bytes))
    problem = replace(facts.problem, m=token_step(facts.problem.m))
    return replace(facts, problem=problem, remote_bytes=(remote,))


def neighbours_count(m: int) -> bool:
    """Whether trials of so many tokens are made as in a graph, if they are of one.

    With those of the narrowest tile the kernel is about as fast as others there, and steps that
    have both lose more by that than a product gains: 8 layers of Llama-3-8B with 0.5% remote take
    1.229 ms with 1 token (`decode_step.json`), chosen as in a graph 1.255 (`decode_step_low.json`);
    with 16 they take 1.352 and 1.311 (`decode_step_16.json`, `decode_step_16_low.json`).
    """
    return TOKEN_TILES[0] < m <= DECODE_TOKENS


def token_step(m: int) -> int:
    """The token tile in decode, above it the next of 182, 256, 363, 512 and so on."""
    if m <= DECODE_TOKENS:
        return next(tile for tile in TOKEN_TILES if tile >= m)
    steps = math.ceil(math.log(m / DECODE_TOKENS, _TOKEN_STEP) - 1e-9)
    return math.ceil(DECODE_TOKENS * _TOKEN_STEP**steps - 1e-6)


def remote_step(nbytes: int) -> int:
    """0, or the next power of 1.3."""
    if nbytes == 0:
        return 0
    steps = math.ceil(math.log(nbytes, _REMOTE_STEP) - 1e-9)
    return math.ceil(_REMOTE_STEP**steps - 1e-6)
