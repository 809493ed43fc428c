"""Which template serves each operator of a rewritten graph, entered in its operator table.

The same question that Inductor's trace of the graph asks: asked here too, because a graph that
comes from Inductor's cache is not traced.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from dak_inductor.lowering import registry
from dak_inductor.lowering.registry import Choice
from dak_inductor.normalise import value_of
from dak_inductor.op_table import OpTable


def choice_for(op_name: str, *args: Any, **kwargs: Any) -> Choice | None:
    """What serves dak::`op_name` with these (fake) arguments; None where it does not run on CUDA.

    There it stays a call, on the simulated tier, and counts.
    """
    tensors = [argument for argument in args if isinstance(argument, torch.Tensor)]
    return registry.choose(op_name, *args, **kwargs) if any(map(on_cuda, tensors)) else None


def on_cuda(value: torch.Tensor) -> bool:
    """Whether the compiled graph will have this value on a CUDA device."""
    return value.device.type == "cuda"


def with_templates(graph_module: GraphModule, table: OpTable) -> OpTable:
    """The table with `template` and `passed_over` of the dak:: operators that run on CUDA."""
    choices = {
        node.name: choice
        for node in graph_module.graph.nodes
        if (choice := _choice(node)) is not None
    }
    if not choices:
        return table
    ops = [
        replace(op, template=choice.template, passed_over=choice.refusals)
        if (choice := choices.get(op.node)) is not None
        else op
        for op in table.ops
    ]
    return replace(table, ops=tuple(ops))


def _choice(node: Node) -> Choice | None:
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "dak":
        return None
    arguments = map_arg(node.args, value_of)
    keywords = map_arg(node.kwargs, value_of)
    return choice_for(node.target._schema.name.removeprefix("dak::"), *arguments, **keywords)
