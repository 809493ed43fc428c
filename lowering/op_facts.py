"""What is known about a call of a dak:: operator while its graph is traced."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

Layout = Literal["out_in", "in_out"]
Shape = tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class OpFacts:
    """One call; sizes that are symbolic, and facts that do not apply, are None.

    dtype:      of the weight.
    m, n, k:    rows of the input, columns of the result, length of the contraction.
    layout:     how the weight lies in memory: "out_in" where K is contiguous, "in_out" where N is;
                None where it is not a 2-D matrix with one contiguous dimension.
    pitches:    elements from one row of each weight to the next, along the other dimension.
    uniform:    operands agree in dtype and device, and two weights in shape and layout.
    scaled:     addmm with a factor that is not 1.
    biases:     the shape of each weight's bias.
    residual:   shape of what is added to the result.
    capability: of the CUDA device the weight is on; None where there is none.
    extension:  dak_inductor's compiled extension is importable.
    triton:     triton is importable.
    """

    dtype: torch.dtype | None = None
    m: int | None = None
    n: int | None = None
    k: int | None = None
    layout: Layout | None = None
    pitches: Shape = ()
    uniform: bool = True
    scaled: bool = False
    biases: tuple[Shape | None, ...] = ()
    residual: Shape | None = None
    capability: tuple[int, int] | None = None
    extension: bool = False
    triton: bool = False


@dataclass(frozen=True, slots=True)
class _Weight:
    """A weight as [N, K]: an operand, or the transpose of one, without tracing a transpose."""

    tensor: Tensor
    transposed: bool = False

    def pair(self, values: Any) -> tuple[Any, Any]:
        first, second = values
        return (second, first) if self.transposed else (first, second)

    @property
    def shape(self) -> Shape:
        return tuple(static_size(size) for size in self.pair(self.tensor.shape))

    @property
    def layout(self) -> Layout | None:
        if self.tensor.dim() != 2 or self.tensor.layout != torch.strided:
            return None
        along_n, along_k = (static_size(step) for step in self.pair(self.tensor.stride()))
        n, k = self.shape
        if along_k == 1 and along_n is not None and k is not None and along_n >= k:
            return "out_in"
        if along_n == 1 and along_k is not None and n is not None and along_k >= n:
            return "in_out"
        return None

    @property
    def pitch(self) -> int | None:
        along_n, along_k = self.pair(self.tensor.stride())
        return static_size(along_n if self.layout == "out_in" else along_k)


@dataclass(frozen=True, slots=True)
class _Operands:
    x: Tensor
    weights: tuple[_Weight, ...]
    biases: tuple[Tensor | None, ...] = (None,)
    residual: Tensor | None = None
    scaled: bool = False


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> _Operands:
    return _Operands(x, (_Weight(weight),), (bias,))


def _addmm(bias: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> _Operands:
    return _Operands(a, (_Weight(b, True),), (bias,), scaled=beta != 1 or alpha != 1)


def _matmul(a: Tensor, b: Tensor) -> _Operands:
    return _Operands(a, (_Weight(b, True),))


def _linear_epilogue(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    layout: str,
) -> _Operands:
    return _Operands(x, (_Weight(weight, layout == "in_out"),), (bias,), residual)


def _gated_linear(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    layout: str,
) -> _Operands:
    weights = (_Weight(gate, layout == "in_out"), _Weight(up, layout == "in_out"))
    return _Operands(x, weights, (gate_bias, up_bias))


_OPERANDS: dict[str, Callable[..., _Operands]] = {
    "linear": _linear,
    "addmm": _addmm,
    "matmul": _matmul,
    "linear_epilogue": _linear_epilogue,
    "gated_linear": _gated_linear,
}


def facts_of(op_name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OpFacts:
    """The facts of a call of dak::`op_name`; tensors may be fake. Adds no guard, traces no op.

    Of an operator without a 2-D weight only the installation and the device are known.
    """
    device = next((a.device for a in args if isinstance(a, Tensor)), None)
    installation = OpFacts(
        capability=None if device is None else visible_capability(device),
        extension=extension_importable(),
        triton=triton_importable(),
    )
    if op_name not in _OPERANDS:
        return installation
    call = _OPERANDS[op_name](*args, **kwargs)
    if any(weight.tensor.dim() != 2 for weight in call.weights) or call.x.dim() == 0:
        return installation
    first = call.weights[0]
    n, k = first.shape
    return replace(
        installation,
        dtype=first.tensor.dtype,
        m=_rows(call.x),
        n=n,
        k=k,
        layout=first.layout,
        pitches=tuple(weight.pitch for weight in call.weights),
        uniform=_uniform(call),
        scaled=call.scaled,
        biases=tuple(_shape(bias) for bias in call.biases),
        residual=_shape(call.residual),
    )


def visible_capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability; None for another device than CUDA, or where no GPU is visible."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


@functools.cache
def extension_importable() -> bool:
    """Whether the compiled extension can be loaded; the CUDA template is launched through it."""
    from dak_inductor.cuda_runtime.nvrtc import extension
    from dak_inductor.errors import UnsupportedDriverError

    try:
        extension()
    except UnsupportedDriverError:
        return False
    return True


@functools.cache
def triton_importable() -> bool:
    """Whether triton is installed; it comes with torch's CUDA wheels, not with its CPU ones."""
    return importlib.util.find_spec("triton") is not None


def _uniform(call: _Operands) -> bool:
    first = call.weights[0]
    tensors = [call.x, *(weight.tensor for weight in call.weights), *call.biases, call.residual]
    return all(
        tensor.dtype == first.tensor.dtype and tensor.device == first.tensor.device
        for tensor in tensors
        if tensor is not None
    ) and all(
        weight.layout == first.layout and weight.shape == first.shape for weight in call.weights
    )


def _rows(x: Tensor) -> int | None:
    rows = 1
    for size in x.shape[:-1]:
        static = static_size(size)
        if static is None:
            return None
        rows *= static
    return rows


def _shape(tensor: Tensor | None) -> Shape | None:
    return None if tensor is None else tuple(static_size(size) for size in tensor.shape)


def static_size(value: Any) -> int | None:
    """An int as it is, None for a symbolic one: asking that for its value would add a guard."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None
