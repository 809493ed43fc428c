"""A contraction of an activation with a weight, as one product that reads the weight where it lies.

Dimensions have labels, as in einsum: those that both operands and the result have are a batch,
those that the result lacks are summed over. What eager does is permute and reshape both operands
for one `bmm`: of a weight whose dimensions do not lie that way, this is a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

Labels = Sequence[str]

_COPIES = 64
"""A copy costs its bytes twice, and where the weight turns out to be local it gains nothing: one
of 1/64 of the weight is 3% of the bytes that the product reads."""


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor and the label of each of its dimensions."""

    tensor: Tensor
    labels: Labels

    def size(self, label: str) -> int:
        """May be symbolic."""
        return self.tensor.shape[self.labels.index(label)]

    def stride(self, label: str) -> int:
        """In elements."""
        return self.tensor.stride(self.labels.index(label))

    def permuted(self, labels: Labels) -> Operand:
        """With the dimensions in this order; a view."""
        if list(labels) == list(self.labels):
            return self
        return Operand(self.tensor.permute([self.labels.index(label) for label in labels]), labels)

    def grouped(self, *groups: Labels) -> Tensor:
        """One dimension for each group of labels; an empty group is a dimension of size 1. A copy
        where no view is possible."""
        return self._grouped(Tensor.reshape, groups)

    def viewed(self, *groups: Labels) -> Tensor:
        """Likewise, where each group `lies_as_one`; a view, and a graph says so."""
        return self._grouped(Tensor.view, groups)

    def _grouped(self, reshape: Callable[..., Tensor], groups: Sequence[Labels]) -> Tensor:
        tensor = self.permuted([label for group in groups for label in group]).tensor
        if all(len(group) == 1 for group in groups):
            return tensor
        return reshape(tensor, [math.prod(map(self.size, group)) for group in groups])


@dataclass(frozen=True, slots=True)
class _Roles:
    """`spread`: the weight's dimensions that are a batch of which the activation has no part."""

    batch: Labels
    spread: Labels
    rows: Labels
    columns: Labels
    summed: Labels


def contract(x: Operand, weight: Operand, result: Labels, memory: Labels) -> Tensor | None:
    """The contraction, with the dimensions of the result in the order `result`; None where it is
    not one product, the weight would be copied, or activations would be and eager copies none.

    Args:
        memory: the order in which the result's dimensions lie in memory, outermost first.
    """
    roles = _roles(x, weight, result)
    if roles is None:
        return None
    made = [*roles.batch, *roles.spread, *roles.rows, *roles.columns]
    shape = _Shape(x, weight)
    copied = 0 if _views_as_one(x, roles.summed) else x.tensor.numel()
    if shape.long(made) != shape.long(memory):
        copied += math.prod(shape.sizes(made))
    columns = [label for label in result if label in (*roles.spread, *roles.columns)]
    if not is_small(copied, weight.tensor, unless_copied=not lies_as_one(weight, columns)):
        return None
    if roles.batch or roles.spread:
        product = _batched(x, weight, roles).view(shape.sizes(made))
    else:
        product = _plain(x, weight, roles)
        if len(roles.columns) > 1:
            product = product.view(shape.sizes(made))
    return _laid_out(product, shape, made, memory).permuted(result).tensor


def is_one(size: int) -> bool:
    """Of a symbolic size this is known: it is not 1."""
    return isinstance(size, int) and size == 1


def is_small(copied: int, weight: Tensor, *, unless_copied: bool = False) -> bool:
    """Whether copies of so many elements cost little beside reading the weight. Without guards: of
    a symbolic size it is not known.

    Args:
        unless_copied: eager copies the weight, which costs as much as copies of its size.
    """
    room = weight.numel() if unless_copied else weight.numel() // _COPIES
    return statically_known_true(copied <= room)


@dataclass(frozen=True, slots=True)
class _Shape:
    """Of what is made of two operands."""

    x: Operand
    weight: Operand

    def sizes(self, labels: Labels) -> list[int]:
        operands = (self.weight if label in self.weight.labels else self.x for label in labels)
        return [operand.size(label) for operand, label in zip(operands, labels, strict=True)]

    def long(self, labels: Labels) -> list[str]:
        """Without dimensions of size 1, which lie anywhere."""
        sizes = zip(labels, self.sizes(labels), strict=True)
        return [label for label, size in sizes if not is_one(size)]


def _laid_out(product: Tensor, shape: _Shape, made: Labels, memory: Labels) -> Operand:
    """The contiguous `product`, its dimensions in the order `made`, with those in another order in
    memory."""
    if list(made) == list(memory):
        return Operand(product, memory)
    if shape.long(made) == shape.long(memory):
        return Operand(product.view(shape.sizes(memory)), memory)
    return Operand(Operand(product, made).permuted(memory).tensor.contiguous(), memory)


def _plain(x: Operand, weight: Operand, roles: _Roles) -> Tensor:
    rows = [(label,) for label in roles.rows]
    activation = x.grouped(*rows, roles.summed)
    if _lies_last(weight, roles.summed):
        return F.linear(activation, weight.viewed(roles.columns, roles.summed))
    return torch.matmul(activation, weight.viewed(roles.summed, roles.columns))


def _batched(x: Operand, weight: Operand, roles: _Roles) -> Tensor:
    activation = x.grouped(roles.batch, roles.rows, roles.summed)
    if roles.spread:
        spread = math.prod(map(weight.size, roles.spread))
        activation = activation.expand(spread, *activation.shape[1:])
    outer = [*roles.batch, *roles.spread]
    return torch.bmm(activation, weight.viewed(outer, roles.summed, roles.columns))


def _lies_last(weight: Operand, labels: Labels) -> bool:
    """Whether the innermost dimension of the weight is one of these."""
    return min(weight.labels, key=weight.stride) in labels


def _roles(x: Operand, weight: Operand, result: Labels) -> _Roles | None:
    if not all(isinstance(value, int) for value in (*weight.tensor.shape, *weight.tensor.stride())):
        return None
    if any(len(set(labels)) != len(labels) for labels in (x.labels, weight.labels, result)):
        return None
    held, shown = set(weight.labels), set(result)
    shared = held & set(x.labels)
    if set(x.labels) - held - shown or held - shared - shown or shown - held - set(x.labels):
        return None  # a dimension of one operand alone is summed over, or one of none is wanted
    if not all(_same_size(x.size(label), weight.size(label)) for label in shared):
        return None
    batch = [label for label in result if label in shared]
    rows = [label for label in result if label not in held]
    inner_last = sorted(weight.labels, key=weight.stride, reverse=True)
    summed = [label for label in inner_last if label in shared - shown]
    columns = [label for label in inner_last if label not in shared]
    if not summed or not columns or any(map(is_one, weight.tensor.shape)):
        return None  # with a size of 1 in a weight, eager lays out the result in other ways
    for spread in ([], columns[:1]) if not batch else ([],):
        roles = _Roles(batch, spread, rows, columns[len(spread) :], summed)
        if all(lies_as_one(weight, part) for part in (batch, roles.columns, summed)):
            return roles if roles.columns else None
    return None


def _same_size(activation: int, weight: int) -> bool:
    """A symbolic size is not 1 and equals the weight's, or eager raises as the product does."""
    return activation == weight if isinstance(activation, int) else weight != 1


def lies_as_one(operand: Operand, labels: Labels) -> bool:
    """Whether these dimensions, in this order, are known to view as a single one."""
    held = [label for label in labels if not is_one(operand.size(label))]
    return all(
        statically_known_true(operand.stride(outer) == operand.size(inner) * operand.stride(inner))
        for outer, inner in pairwise(held)
    )


def _views_as_one(x: Operand, summed: Labels) -> bool:
    """Or in no order of the dimensions, so that eager has to copy them as well."""
    return lies_as_one(x, summed) or not any(
        lies_as_one(x, order) for order in permutations(summed)
    )
