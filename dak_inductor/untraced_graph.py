"""The operator table of a graph that goes to Inductor as it is.

Its operators are not known, and its bytes are: stock kernels read each weight through its address.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dak_inductor.normalise import value_of
from dak_inductor.op_match import dtype_name, nbytes
from dak_inductor.op_table import Op, OpTable, symbols_of
from dak_inductor.provenance import parameter_name
from dak_inductor.refusal import Refusal
from dak_inductor.sizes import Size, add, minimum, product, shape_of


def untraced_table(graph_module: GraphModule, refusal: Refusal) -> OpTable:
    """One stock read of each matrix among the parameters that the graph uses, whole."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    parameters = {
        position: name
        for position, node in enumerate(placeholders)
        if (name := parameter_name(node)) and _has_memory(node)
    }
    symbols, hints = symbols_of(placeholders)
    return OpTable(
        ops=tuple(
            _read(placeholders[position], position, name.rpartition(".")[0])
            for position, name in parameters.items()
            if placeholders[position].users and value_of(placeholders[position]).dim() >= 2
        ),
        refusals=(refusal,),
        placeholders=tuple(node.name for node in placeholders),
        symbols=symbols,
        hints=hints,
        parameters=parameters,
    )


def _has_memory(node: Node) -> bool:
    """The tensors inside of a wrapper subclass (torchao's) are no inputs of the graph."""
    value = value_of(node)
    return isinstance(value, torch.Tensor) and not is_traceable_wrapper_subclass(value)


def _read(node: Node, position: int, module: str) -> Op:
    value = value_of(node)
    return Op(
        node=node.name,
        kind="stock",
        operand=position,
        m=0,
        touched=_touched(node),
        other=0,
        flops=0,
        dtype=dtype_name(value.dtype),
        module=module,
        source="",
        rewrite=False,
    )


def _touched(table: Node) -> Size:
    """All bytes, or those of the rows that are looked up, as Dynamo spells it, if nothing else
    reads the tensor."""
    value = value_of(table)
    whole = nbytes(value)
    rows: Size = 0
    for user in table.users:
        if user.target is not torch.nn.functional.embedding or len(user.args) < 2:
            return whole
        indices = value_of(user.args[0])
        # no call says how many rows those are
        if free_unbacked_symbols(indices) or indices.is_nested:
            return whole
        rows = add(rows, product(shape_of(indices)))
    return minimum(whole, product((rows, *shape_of(value)[1:], value.element_size())))
