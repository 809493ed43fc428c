"""What Inductor does with `dak::residency` and `dak::tiered_mm`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from dak_inductor.lowering import residency  # noqa: F401  (registers the operators)
from dak_inductor.lowering.triton_linear.configuration import (
    DEFAULT_WINDOW,
    REMOTE_ROWS,
    TileConfiguration,
    choose_configuration,
    device_limits,
)
from dak_inductor.lowering.triton_linear.template import template


@lru_cache(maxsize=1)
def register() -> None:
    """Register the lowerings and the template with Inductor. Once per process."""
    from torch._inductor.lowering import register_lowering

    template()
    register_lowering(torch.ops.dak.residency.default, type_promotion_kind=None)(_residency)
    register_lowering(torch.ops.dak.tiered_mm.default, type_promotion_kind=None)(_tiered_mm)


def _residency(weight: Any) -> Any:
    from torch._inductor.virtualized import V

    record = _call(torch.ops.dak.residency.default, weight)
    # It is the runtime's memory: Inductor must not hand it to a later buffer of the same size.
    V.graph.never_reuse_buffers.add(record.get_name())
    return record


def _tiered_mm(x: Any, weight: Any, record: Any, layout: str) -> Any:
    """The template as the only choice: with several, Inductor would measure them on copies.

    The result keeps the three dimensions that x may have: torch 2.11 fuses a pointwise op only
    where its loops are those of the template.
    """
    from torch._inductor import ir
    from torch._inductor.lowering import view
    from torch._inductor.utils import sympy_product

    outer = list(x.get_size()[:-1])
    if len(outer) > 1:
        x = view(x, [sympy_product(outer), x.get_size()[-1]])
    x, weight, record = (ir.ExternKernel.realize_input(each) for each in (x, weight, record))
    out_in = layout == "out_in"
    n, k = weight.get_size() if out_in else reversed(weight.get_size())
    result = ir.FixedLayout(x.get_device(), x.get_dtype(), [*outer, n])
    configuration, programs = _configuration(x, out_in=out_in)
    choices: list[Any] = []
    template().maybe_append_choice(
        choices,
        input_nodes=(x, weight, record),
        layout=result,
        call_sizes=[x.get_size()[0], n],
        num_stages=configuration.stages,
        num_warps=configuration.warps,
        **constants(
            configuration,
            programs=programs,
            out_in=out_in,
            n=int(n),
            k=int(k),
            dtype=x.get_dtype(),
            rank=len(outer) + 1,
        ),
    )
    if not choices:
        product = _call(torch.ops.dak.tiered_mm.default, x, weight, record, layout)
        return view(product, [*outer, n])
    return choices[0].output_node()


def constants(
    configuration: TileConfiguration,
    *,
    programs: int,
    out_in: bool,
    n: int,
    k: int,
    dtype: torch.dtype,
    rank: int = 2,
) -> dict[str, Any]:
    """The template's compile-time constants; `n`, `k` of the weight, `rank` of the result."""
    return {
        "OUT_IN": out_in,
        "RANK": rank,
        "BLOCK_M": configuration.m,
        "BLOCK_N": configuration.n,
        "BLOCK_K": configuration.k,
        "REMOTE_K": REMOTE_ROWS,
        "EVEN_N": n % configuration.n == 0,
        "EVEN_K": k % configuration.k == 0,
        "ITEMSIZE": dtype.itemsize,
        "BYTES_IN_FLIGHT": configuration.bytes_in_flight(dtype.itemsize),
        "DEFAULT_WINDOW": DEFAULT_WINDOW,
        "PROGRAMS": programs,
        "PRECISION": '"tf32"' if _tf32(dtype) else '"ieee"',
    }


def _tf32(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32


def _configuration(x: Any, *, out_in: bool) -> tuple[TileConfiguration, int]:
    """Tile shapes for the rows of `x` (their hint where dynamic), and programs in the grid."""
    limits = device_limits(x.get_device())
    configuration = choose_configuration(
        rows=_hint(x.get_size()[0]),
        itemsize=x.get_dtype().itemsize,
        limits=limits,
        out_in=out_in,
    )
    programs = limits.programs(configuration, x.get_dtype().itemsize, out_in=out_in)
    return configuration, programs


def _hint(size: Any) -> int:
    """A size, or what it was while tracing where it is dynamic; adds no guard."""
    from torch._inductor.virtualized import V

    return int(V.graph.sizevars.optimization_hint(size, fallback=128))


def _call(operator: Any, *args: Any) -> Any:
    from torch._inductor.lowering import fallback_handler

    return fallback_handler(operator, add_to_fallback_set=False)(*args)
