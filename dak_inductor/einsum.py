"""Equations of einsum, read as labels of dimensions; and how eager lays out what they give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dak_inductor.contraction import Labels, Operand, is_one


@dataclass(frozen=True, slots=True)
class Equation:
    """Labels of each operand's dimensions and of the result's. An ellipsis is one label for each
    dimension that it stands for, counted from the last."""

    operands: tuple[Labels, ...]
    result: Labels


def read_equation(equation: str, dimensions: Sequence[int]) -> Equation:
    """Of operands with so many dimensions; the equation is one that eager takes."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    operands = tuple(map(_labels, left.split(","), dimensions))
    hidden = max((_hidden(labels) for labels in operands), key=len, default=[])
    if arrow:
        return Equation(operands, _named(right, hidden))
    count = Counter(label for labels in operands for label in labels)
    once = sorted(label for label, n in count.items() if n == 1 and len(label) == 1)
    return Equation(operands, [*hidden, *once])


def memory_order(first: Operand, second: Operand, result: Labels) -> Labels:
    """In which order the result's dimensions lie in memory, outermost first.

    Eager computes [batch, first, second], or [batch, second, first] where the result wants all of
    the second operand's dimensions before the first's. A dimension of size 1 is the second's.
    """
    ones = {
        label
        for operand in (first, second)
        for label in operand.labels
        if is_one(operand.size(label))
    }
    of_first = [label for label in result if label in first.labels and label not in ones]
    batch = [label for label in of_first if label in second.labels]
    free = [label for label in result if label not in batch]
    left = [label for label in of_first if label not in batch]
    right = [label for label in free if label not in left]
    swapped = [*right, *left]
    order = [*batch, *(swapped if free == swapped else [*left, *right])]
    if [n for n in order if n not in ones] == [n for n in result if n not in ones]:
        return result
    return order


def _labels(text: str, dimensions: int) -> Labels:
    hidden = dimensions - len(text.replace("...", ""))
    return _named(text, [f"...{left}" for left in range(hidden, 0, -1)])


def _named(text: str, hidden: Labels) -> Labels:
    before, dots, after = text.partition("...")
    return [*before, *(hidden if dots else ()), *after]


def _hidden(labels: Labels) -> Labels:
    return [label for label in labels if len(label) > 1]
