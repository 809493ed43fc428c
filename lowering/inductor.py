"""What Inductor makes of the dak:: operators.

On the CPU (the simulated tier) they stay calls, because they count. On CUDA an op that no template
takes expands to its stock equivalent while the graph is traced: the expanded graph is the one that
Inductor would have seen without this backend, so its own fusions, pattern matches and GEMM choices
still apply.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dak_inductor.lowering.ops import OPERATORS


@lru_cache(maxsize=1)
def register() -> None:
    """Make the operators known to Inductor. Called before each compile; works once per process."""
    from torch._inductor.decomposition import register_decomposition
    from torch._inductor.lowering import constrain_to_fx_strides, make_fallback

    for operator in OPERATORS:
        overload = getattr(torch.ops.dak, operator.name).default
        register_decomposition([overload])(_expansion(operator.stock))
        make_fallback(overload, constrain_to_fx_strides, warn=False, override_decomp=True)


def _expansion(stock: Callable[..., Tensor]) -> Callable[..., Any]:
    def expand(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(arg, Tensor) and arg.device.type == "cuda" for arg in args):
            return stock(*args, **kwargs)
        return NotImplemented

    return expand
