"""Which inputs a graph writes to: bytes of theirs must not be copied ahead of who reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node

from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.views import memory_behind


def written_inputs(graph_module: GraphModule) -> tuple[int, ...]:
    """Indices of the graph inputs to whose memory an operator may write, ascending."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    index = {node: number for number, node in enumerate(placeholders)}
    owners = written_memory(graph_module)
    return tuple(sorted(index[owner] for owner in owners if owner in index))


def written_memory(graph_module: GraphModule) -> set[Node]:
    """The nodes to whose memory an operator may write, views followed."""
    return {
        memory_behind(written)
        for node in graph_module.graph.nodes
        if node.op == "call_function"
        for written in _written(node)
    }


def buffers_of(arguments: Sequence[object], inputs: tuple[int, ...]) -> list[TieredBuffer]:
    """The tiered buffers among these inputs of a call."""
    found = [
        address_table.lookup(tensor.data_ptr())
        for tensor in (arguments[number] for number in inputs)
        if isinstance(tensor, torch.Tensor) and type(tensor) in (torch.Tensor, torch.nn.Parameter)
    ]
    return [buffer for buffer in found if buffer is not None]


def _written(node: Node) -> Iterator[Node]:
    if isinstance(node.target, HigherOrderOperator):  # nothing says what it writes
        yield from node.all_input_nodes
        return
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = node.kwargs.get(argument.name)
        if position < len(node.args):
            value = node.args[position]
        for each in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(each, Node):
                yield each
