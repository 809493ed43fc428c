"""Sizes in the symbols of a graph: plain integers where a graph is static, sympy expressions where
it is not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, TypeAlias

import sympy
import torch

# An int, or a sympy expression in the symbols of the graph (sympy is untyped).
Size: TypeAlias = int | Any


def size_of(value: int | torch.SymInt) -> Size:
    """The size as an integer or expression. Adds no guard."""
    if isinstance(value, torch.SymInt):
        expression = value.node.expr
        return int(expression) if expression.is_Integer else expression
    return int(value)


def shape_of(tensor: torch.Tensor) -> tuple[Size, ...]:
    """The shape of a (fake) tensor as sizes."""
    return tuple(size_of(dim) for dim in tensor.shape)


def is_row_major(tensor: torch.Tensor) -> bool:
    """Whether a (fake) tensor's elements are known to lie in row-major order. Adds no guard."""
    expected: Size = 1
    for dim, stride in zip(shape_of(tensor)[::-1], tensor.stride()[::-1], strict=True):
        if dim != 1 and size_of(stride) != expected:
            return False
        expected = expected * dim
    return True


@lru_cache(maxsize=65536)
def _product(factors: tuple[Size, ...]) -> Size:
    result: Size = 1
    for factor in factors:
        result = result * factor
    return result


def product(factors: Iterable[Size]) -> Size:
    """The product; equal factors give the same object, since graphs repeat their shapes."""
    return _product(tuple(factors))


def add(left: Size, right: Size) -> Size:
    """The sum."""
    return left + right


@lru_cache(maxsize=65536)
def _minimum(left: Size, right: Size) -> Size:
    if isinstance(left, int) and isinstance(right, int):
        return min(left, right)
    return sympy.Min(left, right)


def minimum(left: Size, right: Size) -> Size:
    """The smaller of two sizes."""
    return _minimum(left, right)


class Evaluator:
    """Evaluates sizes at given symbol values, each expression once.

    A symbol without a value raises KeyError with its name.
    """

    def __init__(self, values: Mapping[str, int]) -> None:
        self._values = dict(values)
        self._known: dict[sympy.Expr, int] = {}

    def __call__(self, size: Size) -> int:
        if isinstance(size, int):
            return size
        if size not in self._known:
            substitution = {symbol: self._values[str(symbol)] for symbol in size.free_symbols}
            self._known[size] = int(size.subs(substitution))
        return self._known[size]
