"""Activations, gates and residual sums become part of the product before them.

    act(linear(x, W))                         -> dak::linear_epilogue
    [act](linear(x, W)) + residual            -> dak::linear_epilogue
    act(linear(x, G)) * linear(x, U)          -> dak::gated_linear
    act(left half of y) * right half of y,
        y = linear(x, W)                      -> dak::gated_linear on row slices of W

Only where nothing in between is used elsewhere, dtypes and shapes agree, the weight is a graph
input that the operator table holds, something serves the fused operator (on CUDA the CUDA template;
on the CPU, the simulated tier, the stock composition, which counts), and it has few enough tokens.
`linear` stands for every product with a weight on its right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

import dak_inductor.lowering.ops  # noqa: F401  (registers torch.ops.dak)
from dak_inductor.activations import activation_of
from dak_inductor.dead_nodes import erase_unused
from dak_inductor.halves import Half, half_of
from dak_inductor.normalise import value_of
from dak_inductor.op_match import nbytes
from dak_inductor.op_table import Op, OpTable
from dak_inductor.products import Ops, Product, can_move, product_behind, shape
from dak_inductor.sizes import Evaluator, Size, is_row_major
from dak_inductor.templates import choice_for

_aten = torch.ops.aten
_ADD = (_aten.add.Tensor, _aten.add_.Tensor)
_MUL = (_aten.mul.Tensor, _aten.mul_.Tensor)
_VALUE_KEYS = ("val", "tensor_meta", "example_value")

MOST_TOKENS = 512
"""Of a product that takes its epilogue. With 1024 and more the stock GEMM wins nearly always
(`linear_prefill.json`: 398 of 400 cells up to 8192), and what follows it is a pass of its own, or
more. Inductor makes one pass of it together with its neighbours, such as the next normalisation."""


@dataclass(frozen=True, slots=True)
class RowSlice:
    """Rows [start, stop) of a weight, or elements of its bias."""

    whole: Node
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Fusion:
    """The operator `name` with these arguments computes what `root` does.

    `epilogue` says in the user's words what was fused into the product.
    """

    root: Node
    name: str
    arguments: tuple[Any, ...]
    products: tuple[Product, ...]
    epilogue: str
    residual: Node | None = None


def fuse_epilogues(graph_module: GraphModule, table: OpTable) -> OpTable:
    """Fuse in a rewritten graph, in place; the table of the graph as it is then."""
    graph, evaluate = graph_module.graph, Evaluator(table.hints)
    ops: dict[str, tuple[Op, ...]] = {}
    for op in table.ops:
        ops[op.node] = (*ops.get(op.node, ()), op)
    for node in list(graph.nodes):
        fusion = next((f for match in _MATCHES if (f := match(node, ops)) is not None), None)
        if fusion is None or not _agrees(fusion) or not _is_served(fusion):
            continue
        if evaluate(ops[fusion.products[0].node.name][0].m) <= MOST_TOKENS:
            _apply(graph_module, fusion, ops)
    graph_module.recompile()
    in_order = [op for node in graph.nodes for op in ops.get(node.name, ())]
    return replace(table, ops=tuple(in_order))


def _activated(root: Node, ops: Ops) -> Fusion | None:
    activation = activation_of(root)
    if activation is None or not set(activation.source.users) <= set(activation.nodes):
        return None
    product = product_behind(activation.source, ops)
    if product is None or product.activation != "none":
        return None
    return _with_epilogue(root, product, activation.name, None)


def _residual(root: Node, ops: Ops) -> Fusion | None:
    if root.target not in _ADD or any(alpha != 1 for alpha in root.kwargs.values()):
        return None
    left, right = root.args[:2]
    if not isinstance(left, Node) or not isinstance(right, Node) or left is right:
        return None
    pairs = [(left, right)]
    if root.target is _aten.add.Tensor:  # in place, the left operand must be the product's own
        pairs.append((right, left))
    candidates = [
        (product, other)
        for value, other in pairs
        if (product := _only_use(value, root, ops)) is not None and shape(other) == shape(root)
    ]
    if not candidates:
        return None
    # Of two products the later one takes the other as its residual, which is there by then.
    product, residual = max(candidates, key=lambda pair: pair[0].node)
    return _with_epilogue(root, product, product.activation, residual)


def _gated(root: Node, ops: Ops) -> Fusion | None:
    if root.target not in _MUL or len(root.args) != 2:
        return None
    for first, second in (root.args, root.args[::-1]):
        fusion = _gated_pair(root, first, second, ops) or _gated_halves(root, first, second, ops)
        if fusion is not None:
            return fusion
    return None


def _gated_pair(root: Node, first: Any, second: Any, ops: Ops) -> Fusion | None:
    gate, up = _only_use(first, root, ops), _only_use(second, root, ops)
    if gate is None or up is None or gate.node is up.node:
        return None
    if gate.activation == "none" or up.activation != "none" or gate.x is not up.x:
        return None
    if gate.layout != up.layout or shape(gate.weight) != shape(up.weight):
        return None
    arguments = (
        gate.x, gate.weight, up.weight, gate.bias, up.bias, gate.activation, gate.layout,
    )  # fmt: skip
    return Fusion(root, "gated_linear", arguments, (gate, up), f"{gate.activation}(gate) * up")


def _gated_halves(root: Node, first: Any, second: Any, ops: Ops) -> Fusion | None:
    activation = activation_of(first)
    if activation is None or len(first.users) != 1:
        return None
    if not set(activation.source.users) <= set(activation.nodes):
        return None
    gate, up = half_of(activation.source), half_of(second)
    if gate is None or up is None or gate.whole is not up.whole or gate.second == up.second:
        return None
    if set(up.result.users) != {root} or not _only_halves(gate, up):
        return None
    product = product_behind(gate.whole, ops)
    if product is None or product.activation != "none" or product.layout != "out_in":
        return None
    weights, biases = [], []
    for half in (gate, up):
        rows = (half.length, 2 * half.length) if half.second else (0, half.length)
        weights.append(RowSlice(product.weight, *rows))
        biases.append(None if product.bias is None else RowSlice(product.bias, *rows))
    arguments = (product.x, *weights, *biases, activation.name, "out_in")
    epilogue = f"{activation.name}(gate) * up, halves of one weight"
    return Fusion(root, "gated_linear", arguments, (product,), epilogue)


def _only_halves(gate: Half, up: Half) -> bool:
    """Nothing else is made of the whole."""
    results = {gate.result, up.result}
    return set(gate.whole.users) == {gate.maker, up.maker} and all(
        half.maker is half.result or set(half.maker.users) == results for half in (gate, up)
    )


_MATCHES: tuple[Callable[[Node, Ops], Fusion | None], ...] = (_gated, _activated, _residual)


def _with_epilogue(root: Node, product: Product, activation: str, residual: Node | None) -> Fusion:
    arguments = (
        product.x, product.weight, product.bias, residual, activation, product.layout,
    )  # fmt: skip
    parts = [activation] if activation != "none" else []
    parts += ["residual"] if residual is not None else []
    return Fusion(root, "linear_epilogue", arguments, (product,), " + ".join(parts), residual)


def _only_use(value: object, root: Node, ops: Ops) -> Product | None:
    if not isinstance(value, Node) or set(value.users) != {root}:
        return None
    return product_behind(value, ops)


def _agrees(fusion: Fusion) -> bool:
    """One floating dtype and one device throughout, the result's shape and memory order (views of
    it are in the graph already), and no reader overtaken."""
    result = value_of(fusion.root)
    operands = [operand for product in fusion.products for operand in product.operands]
    operands += [] if fusion.residual is None else [fusion.residual]
    values = [value_of(operand) for operand in operands]
    columns = shape(fusion.root)[-1]
    first = fusion.products[0]
    return (
        result.dtype.is_floating_point
        and is_row_major(result)
        and all(v.dtype == result.dtype and v.device == result.device for v in values)
        and (*shape(first.x)[:-1], columns) == shape(fusion.root)
        and all(can_move(product, fusion.root) for product in fusion.products)
    )


def _is_served(fusion: Fusion) -> bool:
    choice = choice_for(fusion.name, *map(_value, fusion.arguments))
    return choice is None or choice.template == "cuda"


def _value(argument: Any) -> Any:
    if isinstance(argument, RowSlice):
        return value_of(argument.whole)[argument.start : argument.stop]
    return value_of(argument)


def _apply(graph_module: GraphModule, fusion: Fusion, ops: dict[str, tuple[Op, ...]]) -> None:
    graph, root = graph_module.graph, fusion.root
    with graph.inserting_before(root):
        arguments = tuple(
            _sliced(graph_module, argument) if isinstance(argument, RowSlice) else argument
            for argument in fusion.arguments
        )
        target = getattr(torch.ops.dak, fusion.name).default
        fused = graph.create_node("call_function", target, arguments, {})
    # the module and the line are those of the product, the value is that of the last step
    fused.meta.update(fusion.products[0].node.meta)
    fused.meta.update({key: root.meta[key] for key in _VALUE_KEYS if key in root.meta})
    ops[fused.name] = _ops_of(fusion, fused, ops)
    for product in fusion.products:
        del ops[product.node.name]
    root.replace_all_uses_with(fused)
    erase_unused(root)


def _sliced(graph_module: GraphModule, rows: RowSlice) -> Node:
    """The slice as a node before the insertion point: a view, which no kernel copies."""
    arguments = (rows.whole, 0, rows.start, rows.stop)
    node = graph_module.graph.create_node("call_function", _aten.slice.Tensor, arguments, {})
    node.meta["val"] = _value(rows)
    return node


def _ops_of(fusion: Fusion, fused: Node, ops: Ops) -> tuple[Op, ...]:
    """One entry per graph input read; the first one bears the flops and the other bytes."""
    parts = [ops[product.node.name][0] for product in fusion.products]
    touched: dict[int, Size] = {}
    for part in parts:
        touched[part.operand] = touched.get(part.operand, 0) + part.touched
    other = nbytes(value_of(fusion.products[0].x)) + nbytes(value_of(fused))
    if fusion.residual is not None:
        other = other + nbytes(value_of(fusion.residual))
    return tuple(
        replace(
            parts[0],
            node=fused.name,
            kind=fusion.name,
            operand=operand,
            touched=read,
            other=other if position == 0 else 0,
            flops=sum(part.flops for part in parts) if position == 0 else 0,
            n=sum(part.n for part in parts),
            epilogue=fusion.epilogue,
        )
        for position, (operand, read) in enumerate(touched.items())
    )
