"""Following a value back to the graph input whose memory it shows, and who writes to that."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch.fx import Node

from dak_inductor.normalise import value_of

_aten = torch.ops.aten

# Operators whose result shares the memory of their first argument.
VIEWS = frozenset(
    {
        _aten.alias.default,
        _aten.as_strided.default,
        _aten.detach.default,
        _aten.detach_.default,
        _aten.expand.default,
        _aten.expand_as.default,
        _aten.mT.default,
        _aten.movedim.int,
        _aten.narrow.default,
        _aten.numpy_T.default,
        _aten.permute.default,
        _aten.select.int,
        _aten.slice.Tensor,
        _aten.squeeze.default,
        _aten.squeeze.dim,
        _aten.squeeze.dims,
        _aten.swapaxes.default,
        _aten.swapdims.default,
        _aten.t.default,
        _aten.transpose.int,
        _aten.unflatten.int,
        _aten.unsqueeze.default,
        _aten.view.default,
        _aten.view_as.default,
    }
)
# Operators whose results, taken out one by one, each share the memory of their first argument.
SPLITS = frozenset(
    {
        _aten.chunk.default,
        _aten.split.Tensor,
        _aten.split.sizes,
        _aten.split_with_sizes.default,
        _aten.tensor_split.indices,
        _aten.tensor_split.sections,
        _aten.unbind.int,
    }
)
SWAPS = frozenset({_aten.transpose.int, _aten.swapaxes.default, _aten.swapdims.default})
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
        if node.op != "call_function" or not (node.target in VIEWS or _is_piece(node)):
            return None
        node = node.args[0]
        if isinstance(node, Node) and node.target in SPLITS:
            node = node.args[0]
    return None


def _is_piece(node: Node) -> bool:
    """Whether it is one of the results of a split."""
    if node.target is not operator.getitem:
        return False
    split = node.args[0]
    return isinstance(split, Node) and split.target in SPLITS


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


def memory_read(node: object) -> Node | None:
    """As `input_behind`, through in-place updates: the input whose memory the value shows after
    them."""
    while isinstance(node, Node):
        if node.op == "placeholder":
            return node
        if node.op != "call_function" or not (node.target in VIEWS or writes_first(node)):
            return None
        node = node.args[0]
    return None


def memory_behind(node: Node) -> Node:
    """The node whose memory this one may show: through views, in-place updates and no-ops."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
        schema = getattr(node.target, "_schema", None)
        aliases = schema is not None and any(r.alias_info is not None for r in schema.returns)
        passes = node.target in MAYBE_VIEWS or node.target is operator.getitem or changes_not(node)
        if not (aliases or passes):
            break
        node = node.args[0]
    return node


def changes_not(node: Node) -> bool:
    """A dropout outside of training, or a cast to the dtype that the value has."""
    if node.target is _aten.dropout.default:
        return bool(node.args[1] == 0 or not node.args[2])
    if node.target in (_aten.to.dtype, _aten.type_as.default):
        before, after = value_of(node.args[0]), value_of(node)
        return bool(before.dtype == after.dtype and before.device == after.device)
    return node.target is _aten.alias.default


def written_between(first: Node, last: Node, operands: Iterable[Node]) -> bool:
    """Whether what `first` reads of `operands` may be another value just before `last`, a later
    node: something wrote to their memory, or entered or left autocast."""
    owners = {memory_behind(operand) for operand in operands}
    node = first.next
    while node is not last:
        if node.op in ("root", "output"):
            return True
        if node.op == "call_function" and (
            "autocast" in getattr(node.target, "__name__", "") or _writes(node, owners)
        ):
            return True
        node = node.next
    return False


def updated_in_place(node: Node) -> bool:
    """Whether the graph writes to the memory of this graph input."""
    return any(
        writes_first(user) and memory_behind(user.args[0]) is node  # type: ignore[arg-type]
        for user in showing(node)
    )


def showing(node: Node) -> Iterable[Node]:
    """Everything that is computed from the node's memory, views followed."""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if user not in seen:
                seen.add(user)
                yield user
                if memory_behind(user) is node:
                    pending.append(user)


def writes_first(node: Node) -> bool:
    """Whether an operator updates its first argument in place."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return False
    alias = schema.arguments[0].alias_info
    return alias is not None and bool(alias.is_write)


def _writes(node: Node, owners: set[Node]) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return False
    return any(memory_behind(argument) in owners for argument in node.all_input_nodes)
