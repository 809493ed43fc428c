"""What Inductor makes of the dak:: operators.

On the CPU (the simulated tier) they stay calls, because they count. On CUDA the registry decides
while the graph is traced. An op for the CUDA template stays a call too: its implementation finds
the tier by the weight's address when it runs. A product for the Triton template expands to the
product and its epilogue, which Inductor fuses; attention for it stays a call. Any other op expands
to its stock equivalent: the expanded graph is the one that Inductor would have seen without this
backend, so its own fusions, pattern matches and GEMM choices still apply.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dak_inductor.lowering import registry, residency
from dak_inductor.lowering.op_facts import triton_importable
from dak_inductor.lowering.operator_record import Operator
from dak_inductor.lowering.ops import OPERATORS
from dak_inductor.lowering.triton_linear import expansion


def register() -> None:
    """Make the operators known to Inductor. Called before each compile; registers once."""
    _register_operators()
    residency.prepare()


@lru_cache(maxsize=1)
def _register_operators() -> None:
    from torch._inductor.decomposition import fast_random_decomps, register_decomposition
    from torch._inductor.lowering import constrain_to_fx_strides, make_fallback

    for operator in OPERATORS:
        overload = getattr(torch.ops.dak, operator.name).default
        register_decomposition([overload])(_expansion(operator))
        make_fallback(overload, constrain_to_fx_strides, warn=False, override_decomp=True)
    # Inductor copies the table at its first compile, which may have been another backend's.
    fast_random_decomps.cache_clear()
    if triton_importable():
        from dak_inductor.lowering.triton_linear import inductor

        inductor.register()


def _expansion(operator: Operator) -> Callable[..., Any]:
    def expand(*args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(arg, Tensor) and arg.device.type == "cuda" for arg in args):
            return NotImplemented
        choice = registry.choose(operator.name, *args, **kwargs)
        if choice.template == "cuda" or (
            choice.template == "triton" and operator.name not in registry.LINEAR_OPS
        ):
            return NotImplemented
        if choice.template == "triton":
            return expansion.expand(operator.name, *args, **kwargs)
        return operator.stock(*args, **kwargs)

    return expand
