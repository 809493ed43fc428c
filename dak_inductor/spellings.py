"""Products with a parameter that are spelled neither `linear` nor `x @ w`, respelled so.

einsum, tensordot, bilinear and their like are one ATen operator each, which says nothing of the
product in it. `respellings` are decompositions for the trace that normalises a graph. An operator
that reads no offloaded parameter, is not one product with it, or would take copies of activations
that are not small beside it stays for Inductor as it was. Values, shapes and memory order of the
results are eager's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dak_inductor.contraction import (
    Labels,
    Operand,
    contract,
    is_one,
    is_small,
    lies_as_one,
)
from dak_inductor.einsum import memory_order, read_equation

_aten = torch.ops.aten


def respellings(
    weights: Iterable[Tensor], *, autocast: bool = False
) -> dict[Any, Callable[..., Any]]:
    """Decompositions by operator, for a graph of which these (fake) inputs are offloaded weights.

    Args:
        autocast: some of the graph is under autocast, which the trace does not show. There eager
            computes tensordot and bilinear in the widest dtype, but products in the narrow one.
    """
    memory = frozenset(_memory(weight) for weight in weights if _is_plain(weight))
    if not memory:
        return {}
    spellings = _Spellings(memory, autocast)
    return {
        _aten.einsum.default: spellings.einsum,
        _aten.tensordot.default: spellings.tensordot,
        _aten.inner.default: spellings.inner,
        _aten.bilinear.default: spellings.bilinear,
        _aten.matmul.default: spellings.matmul,
        _aten.linalg_matmul.default: spellings.linalg_matmul,
        _aten.mm.default: spellings.matmul,
        _aten.bmm.default: spellings.bmm,
        _aten.mv.default: spellings.matmul,
        _aten.addmv.default: spellings.addmv,
        _aten.reshape.default: spellings.reshape,
        _aten.flatten.using_ints: spellings.flatten,
        _aten.contiguous.default: spellings.contiguous,
    }


class _Spellings:
    def __init__(self, weights: frozenset[int], autocast: bool) -> None:
        self._weights = weights
        self._autocast = autocast

    def _is_weight(self, value: object) -> bool:
        """A view of a weight that has a matrix's dimensions or more."""
        return (
            self._is_offloaded(value)
            and isinstance(value, Tensor)
            and value.dim() >= 2
            and value.dtype.is_floating_point
        )

    def _is_offloaded(self, value: object) -> bool:
        return isinstance(value, Tensor) and _is_plain(value) and _memory(value) in self._weights

    def _is_dense(self, value: Tensor) -> bool:
        """A weight in row-major order; one with symbolic sizes is not asked, which would guard."""
        sizes = value.shape if self._is_weight(value) else ()
        return bool(sizes) and all(type(n) is int for n in sizes) and value.is_contiguous()

    def _contract(self, first: Operand, second: Operand, result: Labels, memory: Labels) -> Any:
        """Of a pair of operands, the weight among them; NotImplemented where neither is one, or
        both are: stock operators count the bytes of both."""
        if self._is_offloaded(first.tensor) and self._is_offloaded(second.tensor):
            return NotImplemented
        for weight, x in ((second, first), (first, second)):
            if self._is_weight(weight.tensor):
                product = contract(x, weight, result, memory)
                if product is not None:
                    return product
        return NotImplemented

    def einsum(
        self, equation: str, operands: Sequence[Tensor], *, path: Sequence[int] | None = None
    ) -> Any:
        """Of two operands: where eager lays out what more of them give depends on a path."""
        if len(operands) != 2 or not any(map(self._is_weight, operands)):
            return NotImplemented
        read = read_equation(equation, [operand.dim() for operand in operands])
        first, second = map(Operand, operands, read.operands)
        memory = memory_order(first, second, read.result)
        return self._contract(first, second, read.result, memory)

    def tensordot(
        self, left: Tensor, right: Tensor, dims_self: Sequence[int], dims_other: Sequence[int]
    ) -> Any:
        """Free dimensions in their order, those on the left first."""
        if self._autocast:
            return NotImplemented
        first = [f"l{dim}" for dim in range(left.dim())]
        second = [f"r{dim}" for dim in range(right.dim())]
        for number, (a, b) in enumerate(zip(dims_self, dims_other, strict=True)):
            first[a] = second[b] = f"s{number}"
        result = [label for label in (*first, *second) if not label.startswith("s")]
        return self._contract(Operand(left, first), Operand(right, second), result, result)

    def inner(self, left: Tensor, right: Tensor) -> Any:
        """Over the last dimension of both."""
        if left.dim() == 0 or right.dim() == 0:
            return NotImplemented
        return self.tensordot(left, right, [-1], [-1])

    def bilinear(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        """weight is [O, I, J]: [O * I, J] times y, then a product over I for each row of x."""
        if not self._is_dense(weight) or self._is_offloaded(y) or self._autocast:
            return NotImplemented
        half = F.linear(y, weight.view(-1, weight.shape[2]))
        half = half.view(*half.shape[:-1], *weight.shape[:2])
        result = torch.matmul(half, x.unsqueeze(-1)).squeeze(-1)
        return result if bias is None else result + bias

    def matmul(self, left: Tensor, right: Tensor) -> Any:
        """With the weight on the left and few columns; on the right it is as wanted already."""
        if not self._is_weight(left) or left.dim() != 2 or right.dim() == 0:
            return NotImplemented
        batch = [f"b{dim}" for dim in range(right.dim() - 2)]
        columns = ["p"] if right.dim() > 1 else []
        if columns and not is_one(right.shape[-1]) and not is_small(right.numel(), left):
            return NotImplemented  # the kernels want its columns as rows
        result = [*batch, "n", *columns]
        x = Operand(right, [*batch, "k", *columns])
        return self._contract(x, Operand(left, ["n", "k"]), result, result)

    def linalg_matmul(self, left: Tensor, right: Tensor) -> Any:
        """Another name."""
        if not (self._is_weight(left) or self._is_weight(right)):
            return NotImplemented
        return torch.matmul(left, right)

    def bmm(self, left: Tensor, right: Tensor) -> Any:
        """With one matrix for the whole batch. On the right, the rows of the batch must lie as one
        matrix: `matmul` would copy others, which stock `bmm` does not."""
        if self._is_weight(right) and _repeats(right):
            if lies_as_one(Operand(left, "bnk"), "bn"):
                return torch.matmul(left, right.select(0, 0))
            return NotImplemented
        if self._is_weight(left) and _repeats(left):
            return torch.matmul(left.select(0, 0), right)
        return NotImplemented

    def addmv(
        self, bias: Tensor, weight: Tensor, x: Tensor, *, beta: float = 1, alpha: float = 1
    ) -> Any:
        """A linear layer, where it adds all of the bias."""
        if not self._is_weight(weight) or beta != 1 or alpha != 1 or bias.dim() != 1:
            return NotImplemented
        if not isinstance(bias.shape[0], int) or bias.shape[0] != weight.shape[0]:
            return NotImplemented
        return F.linear(x, weight, bias)

    def reshape(self, tensor: Tensor, shape: Sequence[int]) -> Any:
        """Of contiguous memory it is a view."""
        if not self._is_dense(tensor):
            return NotImplemented
        return tensor.view(shape)

    def flatten(self, tensor: Tensor, start_dim: int = 0, end_dim: int = -1) -> Any:
        """Likewise."""
        start, end = start_dim % max(tensor.dim(), 1), end_dim % max(tensor.dim(), 1)
        if start == end:
            return NotImplemented
        return self.reshape(tensor, [*tensor.shape[:start], -1, *tensor.shape[end + 1 :]])

    def contiguous(
        self, tensor: Tensor, *, memory_format: torch.memory_format = torch.contiguous_format
    ) -> Any:
        """Nothing, where it is."""
        wanted = memory_format == torch.contiguous_format
        return tensor if wanted and self._is_dense(tensor) else NotImplemented


def _repeats(stack: Tensor) -> bool:
    """Whether all matrices of the stack are one."""
    size, step = stack.shape[0], stack.stride(0)
    return is_one(size) or (isinstance(step, int) and step == 0)


def _is_plain(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.layout == torch.strided


def _memory(tensor: Tensor) -> int:
    """The same for all views of one memory."""
    return tensor.untyped_storage()._cdata
