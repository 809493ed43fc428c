"""Which weights have rows that the link can copy ahead of their products."""

from __future__ import annotations

from dak_inductor.inventory import Entry
from dak_inductor.lowering.element_types import ELEMENT_BYTES
from dak_inductor.lowering.linear.ring_plan import LEAST_FEATURES

_TRANSPOSED = ("Conv1D",)
"""Linear layers of transformers that store [in, out]."""


def row_block(entry: Entry) -> int:
    """Bytes of the rows that copies come in; 0 for what is no [out, in] matrix of a 16-bit type."""
    member = entry.members[0]
    tensor = member.tensor
    half = tensor.is_floating_point() and tensor.itemsize == ELEMENT_BYTES
    if len(entry.members) > 1 or tensor.dim() != 2 or not half:
        return 0
    if any(type(module).__name__ in _TRANSPOSED for module, _ in member.readers):
        return 0
    return LEAST_FEATURES * tensor.shape[1] * tensor.itemsize
