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
    `in_graph`: it has few tokens and lies between kernels of a compiled graph, which start early.
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
