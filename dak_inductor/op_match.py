"""What a rule finds in one node of a graph: what it reads and computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from dak_inductor.normalise import value_of
from dak_inductor.sizes import Size, minimum, product, shape_of


@dataclass(frozen=True, slots=True)
class Read:
    """`touched` bytes of graph input `source`, read per call."""

    source: Node
    touched: Size

    @classmethod
    def of(cls, operand: Node, source: Node) -> Read:
        """A read of every element of `operand`, a view of `source`; an expanded view is read
        once."""
        value = value_of(operand)
        whole = value_of(source)
        touched = minimum(nbytes(value), nbytes(whole))
        return cls(source, touched)


@dataclass(frozen=True, slots=True)
class Match:
    """What a rule found. `reads` holds the operands that lie behind graph inputs, weights first.

    `refusal` is why it is not rewritten, though it could be with other operands; "" for nothing.
    `n` is how many features a product makes of each of its `m` rows; 0 where it has no one weight.
    """

    kind: str
    reads: tuple[Read, ...]
    m: Size
    other: Size
    flops: Size
    dtype: str
    rewrite: bool = True
    refusal: str = ""
    n: Size = 0


def nbytes(tensor: torch.Tensor) -> Size:
    """Bytes of all elements of a (fake) tensor."""
    return product((*shape_of(tensor), tensor.element_size()))


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
