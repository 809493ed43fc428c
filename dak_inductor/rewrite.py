"""ATen ops become dak:: ops, on a copy of the graph.

Every eligible op is rewritten, whatever the plan says: where the bytes live is looked up by address
when the op runs, so the rewritten graph outlives every plan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

import dak_inductor.lowering.ops  # noqa: F401  (registers torch.ops.dak)
from dak_inductor.attention_rewrite import write_attention, write_update
from dak_inductor.normalise import copy_graph_attributes
from dak_inductor.op_table import OpTable

_aten = torch.ops.aten
_dak = torch.ops.dak

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _same(node: Node) -> Arguments:
    return node.args, dict(node.kwargs)


def _gather(node: Node) -> Arguments:
    return (node.args[0], node.args[1][0]), {}  # type: ignore[index]


def _index_select(node: Node) -> Arguments:
    return (node.args[0], node.args[2]), {}


_TARGETS: dict[Any, tuple[Any, Callable[[Node], Arguments]]] = {
    _aten.linear.default: (_dak.linear.default, _same),
    _aten.addmm.default: (_dak.addmm.default, _same),
    _aten.mm.default: (_dak.matmul.default, _same),
    _aten.bmm.default: (_dak.matmul.default, _same),
    _aten.matmul.default: (_dak.matmul.default, _same),
    _aten.embedding.default: (_dak.embedding.default, _same),
    _aten.index.Tensor: (_dak.gather.default, _gather),
    _aten.index_select.default: (_dak.gather.default, _index_select),
    _aten._grouped_mm.default: (_dak.grouped_mm.default, _same),
}


def rewrite(graph_module: GraphModule, table: OpTable) -> GraphModule:
    """A copy of the graph with the eligible ops of `table` replaced; names, metadata and
    placeholders are kept."""
    eligible = {op.node: op.kind for op in table.ops if op.rewrite}
    graph = Graph()
    copies: dict[Node, Node] = {}
    copied: Any = graph.graph_copy(graph_module.graph, copies, return_output_node=True)
    if copied is not None:
        value, original = copied
        graph.output(value).meta.update(original.meta)
    for node in list(graph.nodes):
        kind = eligible.get(node.name)
        if kind == "attention":
            if node.target is not _dak.attention.default:
                write_attention(node)
        elif kind is not None and node.target in _TARGETS:
            _retarget(node)
        else:
            write_update(node)
    result = GraphModule(graph_module, graph)
    copy_graph_attributes(graph_module, result)
    for old, new in copies.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    return result


def _retarget(node: Node) -> None:
    """In place: the node keeps its name, by which the operator table knows it, and its users."""
    target, arguments_of = _TARGETS[node.target]
    node.args, node.kwargs = arguments_of(node)
    node.target = target
