"""The dak:: operators that multiply by a weight, plain and with a fused epilogue.

The stock compositions are the reference: they round where eager does, each step in the dtype of the
input. On CUDA a tiered weight goes to `dak_inductor.lowering.linear`, which is looked for at the
first call; what it declines runs as the stock composition.

    dak::linear(x [..., K], weight [N, K], bias [N]?)                  -> [..., N]
    dak::addmm(bias, a [M, K], b [K, N], beta, alpha)                  -> [M, N]
    dak::matmul(a, b)                                                  -> as torch.matmul
    dak::linear_epilogue(x, weight, bias?, residual?, activation, layout)
        activation(x @ W^T + bias) + residual                          -> [..., N]
    dak::gated_linear(x, gate, up, gate_bias?, up_bias?, activation, layout)
        activation(x @ gate^T + gate_bias) * (x @ up^T + up_bias)      -> [..., N]

A layout is "out_in" (weights are [N, K]) or "in_out" ([K, N]); an activation is one of
`ACTIVATIONS`; a residual has the shape of the result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from dak_inductor.lowering import reads
from dak_inductor.lowering.operator_record import Operator

log = logging.getLogger(__name__)

_aten = torch.ops.aten

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Stock = Callable[[], Tensor]

LAYOUTS = ("out_in", "in_out")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "silu": _aten.silu.default,
    "gelu": _aten.gelu.default,
    "gelu_tanh": lambda y: _aten.gelu.default(y, approximate="tanh"),
}


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _aten.linear.default(x, weight, bias)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    return _aten.addmm.default(bias, a, b, beta=beta, alpha=alpha)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    return _aten.matmul.default(a, b)


def linear_epilogue_of(
    product: Product,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    layout: str,
) -> Tensor:
    """The composition of dak::linear_epilogue from a product (x, weight [N, K], bias or None)."""
    y = _activation(activation)(product(x, _out_in(weight, layout), bias))
    if residual is None:
        return y
    if residual.shape != y.shape:
        raise ValueError(
            f"dak::linear_epilogue: a residual of shape {tuple(residual.shape)} for a result of "
            f"shape {tuple(y.shape)}; they must be equal"
        )
    return _aten.add.Tensor(y, residual)


def gated_linear_of(
    product: Product,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    layout: str,
) -> Tensor:
    """The composition of dak::gated_linear, likewise."""
    act = _activation(activation)(product(x, _out_in(gate, layout), gate_bias))
    return _aten.mul.Tensor(act, product(x, _out_in(up, layout), up_bias))


_linear_epilogue = partial(linear_epilogue_of, _linear)
_gated_linear = partial(gated_linear_of, _linear)


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is none of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _out_in(weight: Tensor, layout: str) -> Tensor:
    """The weight as [N, K]; a view."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is none of {', '.join(LAYOUTS)}")
    return weight if layout == "out_in" else _aten.t.default(weight)


@lru_cache(maxsize=1)
def _runner() -> Callable[..., Tensor | None] | None:
    """The entry of the CUDA kernels; None where this installation has none."""
    try:
        from dak_inductor.lowering.linear import run
    except ImportError as error:
        log.warning("no CUDA kernel for linear layers, stock kernels run instead: %s", error)
        return None
    return run


def _serve(
    x: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    residual: Tensor | None,
    activation: str,
    stock: Stock,
) -> Tensor | None:
    """Offer a call to the kernels, `weights` given as [N, K] views of whatever memory order.

    None where they do not take it: the caller then runs `stock`, or what is the same.
    """
    run = _runner()
    if run is None or x.dim() == 0:
        return None
    layout = "out_in"
    if not all(map(_has_dense_rows, weights)):
        layout, weights = "in_out", tuple(weight.t() for weight in weights)
        if not all(map(_has_dense_rows, weights)):
            return None
    return run(
        x,
        weights,
        biases=biases,
        residual=residual,
        activation=activation,
        layout=layout,
        stock=stock,
    )


def _has_dense_rows(matrix: Tensor) -> bool:
    return matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]


def _serve_linear(
    stock: Stock, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor | None:
    if weight.dim() != 2 or (bias is not None and bias.dim() != 1):
        return None
    return _serve(x, (weight,), (bias,), None, "none", stock)


def _serve_addmm(
    stock: Stock, bias: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1
) -> Tensor | None:
    if beta != 1 or alpha != 1 or bias.shape != b.shape[1:]:
        return None
    return _serve(a, (b.t(),), (bias,), None, "none", stock)


def _serve_matmul(stock: Stock, a: Tensor, b: Tensor) -> Tensor | None:
    return _serve(a, (b.t(),), (None,), None, "none", stock) if b.dim() == 2 else None


def _serve_linear_epilogue(
    stock: Stock,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    layout: str,
) -> Tensor | None:
    return _serve(x, (_out_in(weight, layout),), (bias,), residual, activation, stock)


def _serve_gated_linear(
    stock: Stock,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    layout: str,
) -> Tensor | None:
    weights = (_out_in(gate, layout), _out_in(up, layout))
    return _serve(x, weights, (gate_bias, up_bias), None, activation, stock)


def _operator(
    schema: str,
    stock: Callable[..., Tensor],
    kernel: Callable[..., Tensor | None],
    operands: Callable[..., tuple[Tensor, ...]],
) -> Operator:
    name = schema.partition("(")[0]

    def count(*args: Any, **kwargs: Any) -> None:
        reads.count_dense(name, *operands(*args, **kwargs))

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        count(*args, **kwargs)
        return stock(*args, **kwargs)

    def serve(*args: Any, **kwargs: Any) -> Tensor | None:
        return kernel(partial(counted, *args, **kwargs), *args, **kwargs)

    return Operator(name, schema, stock, count, serve)


LINEAR_OPERATORS: tuple[Operator, ...] = (
    _operator(
        "linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
        _linear,
        _serve_linear,
        lambda x, weight, bias=None: (weight,),
    ),
    _operator(
        "addmm(Tensor bias, Tensor a, Tensor b, Scalar beta=1, Scalar alpha=1) -> Tensor",
        _addmm,
        _serve_addmm,
        lambda bias, a, b, beta=1, alpha=1: (a, b),
    ),
    _operator(
        "matmul(Tensor a, Tensor b) -> Tensor",
        _matmul,
        _serve_matmul,
        lambda a, b: (a, b),
    ),
    _operator(
        "linear_epilogue(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, "
        "str activation, str layout) -> Tensor",
        _linear_epilogue,
        _serve_linear_epilogue,
        lambda x, weight, *_: (weight,),
    ),
    _operator(
        "gated_linear(Tensor x, Tensor gate, Tensor up, Tensor? gate_bias, Tensor? up_bias, "
        "str activation, str layout) -> Tensor",
        _gated_linear,
        _serve_gated_linear,
        lambda x, gate, up, *_: (gate, up),
    ),
)
