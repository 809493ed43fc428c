"""Following a value back to the graph input whose memory it shows."""

from __future__ import annotations

import torch
from torch.fx import Node

_aten = torch.ops.aten

# Operators whose result shares the memory of their first argument.
VIEWS = frozenset(
    {
        _aten.alias.default,
        _aten.as_strided.default,
        _aten.detach.default,
        _aten.detach_.default,
        _aten.expand.default,
        _aten.narrow.default,
        _aten.numpy_T.default,
        _aten.permute.default,
        _aten.select.int,
        _aten.slice.Tensor,
        _aten.squeeze.default,
        _aten.squeeze.dim,
        _aten.squeeze.dims,
        _aten.t.default,
        _aten.transpose.int,
        _aten.unflatten.int,
        _aten.unsqueeze.default,
        _aten.view.default,
    }
)
# These share it where the layout allows; for following a KV cache to its input they count as views.
MAYBE_VIEWS = frozenset(
    {
        _aten.contiguous.default,
        _aten.flatten.using_ints,
        _aten.reshape.default,
        _aten.to.dtype,
        _aten.to.dtype_layout,
        _aten.to.device,
    }
)
UPDATES = frozenset(
    {
        _aten.copy_.default,
        _aten.index_copy_.default,
        _aten.index_put_.default,
        _aten.slice_scatter.default,
    }
)


def input_behind(node: object) -> Node | None:
    """The placeholder whose memory `node` is a view of; None if it is computed."""
    while isinstance(node, Node):
        if node.op == "placeholder":
            return node
        if node.op != "call_function" or node.target not in VIEWS:
            return None
        node = node.args[0]
    return None


def cache_behind(node: object) -> Node | None:
    """As `input_behind`, through in-place updates and repeated heads: the input that holds a KV
    cache."""
    while isinstance(node, Node):
        if node.op == "placeholder":
            return node
        if node.op != "call_function" or node.target not in VIEWS | MAYBE_VIEWS | UPDATES:
            return None
        node = node.args[0]
    return None
