"""The operators of a graph that could read a tiered operand: how many bytes they touch and what
they compute.

Built from a normalised graph; sizes stay in the graph's symbols. Whether an operand is tiered is
not known here: one graph may serve many weights, so tensors are named by graph input, and bound to
tiers at call time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from dak_inductor.local_ops import LocalOp, local_ops
from dak_inductor.lowering.registry import TemplateRefusal
from dak_inductor.normalise import value_of
from dak_inductor.op_match import Match, Read, dtype_name
from dak_inductor.op_rules import RULES
from dak_inductor.plan import OpUse
from dak_inductor.provenance import module_of, parameter_name, source_of
from dak_inductor.refusal import Refusal
from dak_inductor.sizes import Evaluator, Size, size_of
from dak_inductor.views import SPLITS, input_behind

_aten = torch.ops.aten
_NO_TEMPLATE = "no template for this operator; its stock kernel reads the tensor"
_NOT_RESPELLED = (
    "not one product that reads the weight where it lies, or one that takes copies of activations, "
    "or the weight was not offloaded when this was compiled; its stock kernel reads the tensor"
)
_REASONS = {
    getattr(_aten, name).default: _NOT_RESPELLED
    for name in ("einsum", "tensordot", "inner", "bilinear", "mv", "addmv", "linalg_matmul")
}


@dataclass(frozen=True, slots=True)
class Op:
    """One operator and one graph input that it reads.

    kind:    linear, addmm, matmul, linear_epilogue, gated_linear, attention, embedding, gather,
             grouped_mm, or stock (an operator that is not rewritten and reads the input through
             its address).
    operand: index of the graph input.
    m:       rows of the activation side.
    n:       features of the result of a product with one weight, or with gate and up; else 0.
    touched: bytes of the operand read per call.
    other:   bytes of all further operands and of the result.
    flops:   floating-point operations per call, counted once per operator.
    rewrite: True where the operator becomes a dak:: op.
    epilogue: what was fused into the product, for reports; "" for nothing.
    template: what serves the operator on CUDA: "cuda", "triton" or "stock"; "" on the CPU, and for
             an operator that is not rewritten.
    passed_over: the templates that do not serve it, each with the reason.
    """

    node: str
    kind: str
    operand: int
    m: Size
    touched: Size
    other: Size
    flops: Size
    dtype: str
    module: str
    source: str
    rewrite: bool
    epilogue: str = ""
    template: str = ""
    passed_over: tuple[TemplateRefusal, ...] = ()
    n: Size = 0

    @property
    def counts_itself(self) -> bool:
        """On CUDA: the kernel adds what it reads to a record on the device."""
        return self.template in ("cuda", "triton")


@dataclass(frozen=True, slots=True)
class SymbolSource:
    """Where a symbol's value is found at call time: a graph input, or one dimension of it."""

    symbol: str
    placeholder: int
    dimension: int | None


@dataclass(frozen=True, slots=True)
class OpTable:
    """All operators of one graph, what was refused, and how to read symbol values from a call.

    `parameters` names the graph inputs that are parameters or buffers of a module, by index.
    `local_ops` is what the graph does beside `ops`.
    """

    ops: tuple[Op, ...]
    refusals: tuple[Refusal, ...]
    placeholders: tuple[str, ...]
    symbols: tuple[SymbolSource, ...]
    hints: Mapping[str, int]
    parameters: Mapping[int, str]
    local_ops: tuple[LocalOp, ...] = ()

    def operands(self) -> tuple[int, ...]:
        """Indices of the graph inputs that any operator reads, ascending."""
        return tuple(sorted({op.operand for op in self.ops}))

    def symbol_values(self, arguments: Sequence[object]) -> dict[str, int]:
        """The values of the graph's symbols in one call."""
        values: dict[str, int] = {}
        for source in self.symbols:
            argument = arguments[source.placeholder]
            if source.dimension is None:
                values[source.symbol] = int(argument)  # type: ignore[call-overload]
            else:
                assert isinstance(argument, torch.Tensor)
                values[source.symbol] = int(argument.shape[source.dimension])
        return values

    def uses(
        self,
        names: Mapping[int, str],
        *,
        graph: str,
        calls: float,
        values: Mapping[str, int] | None = None,
    ) -> list[OpUse]:
        """The planner's view of the graph, in its order. What reads no named tensor is local.

        Args:
            names: tensor name by index of graph input.
            values: symbol values; the hints of the compile are used for those that are missing.
        """
        evaluate = Evaluator({**self.hints, **(values or {})})
        return [
            OpUse(
                op=op.node,
                graph=graph,
                tensor=names.get(op.operand, ""),
                kind=op.kind,
                touched_bytes=evaluate(op.touched),
                other_bytes=evaluate(op.other),
                flops=evaluate(op.flops),
                calls=calls,
                dtype=op.dtype,
                module=op.module,
                source=op.source,
                m=evaluate(op.m),
                n=evaluate(op.n),
            )
            for op in self.in_order()
        ]

    def in_order(self) -> Iterator[Op | LocalOp]:
        """`ops` and `local_ops` as the graph has them."""
        behind: dict[str, list[LocalOp]] = {}
        for each in self.local_ops:
            behind.setdefault(each.after, []).append(each)
        yield from behind.get("", ())
        for op, following in zip_longest(self.ops, self.ops[1:]):
            yield op
            if following is None or following.node != op.node:  # an operator may read two tensors
                yield from behind.get(op.node, ())


def build_op_table(graph_module: GraphModule) -> OpTable:
    """Read the operator table off a normalised graph. Changes nothing and adds no guard."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    index = {node: position for position, node in enumerate(placeholders)}
    ops: list[Op] = []
    refusals: list[Refusal] = []
    for node in graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        rule = RULES.get(node.target)
        if rule is None:
            _stock_reads(node, index, ops, refusals)
            continue
        match = rule(node)
        if match is None:
            continue
        if isinstance(match, str):
            refusals.append(_refuse(node, match))
            _stock_reads(node, index, ops, refusals, quiet=True)
            continue
        if match.refusal:
            refusals.append(_refuse(node, match.refusal))
        ops.extend(_ops_of(node, match, index))
    symbols, hints = symbols_of(placeholders)
    return OpTable(
        ops=tuple(ops),
        refusals=tuple(refusals),
        placeholders=tuple(node.name for node in placeholders),
        symbols=symbols,
        hints=hints,
        parameters={
            position: name
            for position, node in enumerate(placeholders)
            if (name := parameter_name(node)) and isinstance(value_of(node), torch.Tensor)
        },
    )


def with_local_ops(graph_module: GraphModule, table: OpTable) -> OpTable:
    """The table with what the graph does beside its operators."""
    known = {op.node: op.kind for op in table.ops}
    return replace(table, local_ops=local_ops(graph_module, known))


def _ops_of(node: Node, match: Match, index: Mapping[Node, int]) -> list[Op]:
    module, source = module_of(node), source_of(node)
    reads = [read for read in match.reads if read.source in index]
    return [
        Op(
            node=node.name,
            kind=match.kind,
            operand=index[read.source],
            m=match.m,
            n=match.n,
            touched=read.touched,
            other=match.other if position == 0 else 0,
            flops=match.flops if position == 0 else 0,
            dtype=match.dtype,
            module=module,
            source=source,
            rewrite=match.rewrite,
        )
        for position, read in enumerate(reads)
    ]


def _stock_reads(
    node: Node,
    index: Mapping[Node, int],
    ops: list[Op],
    refusals: list[Refusal],
    *,
    quiet: bool = False,
) -> None:
    """An operator without a rule that reads a matrix among the parameters costs bytes all the
    same."""
    results = [value for value in tree_leaves(value_of(node)) if isinstance(value, torch.Tensor)]
    if not results or node.target in SPLITS or input_behind(node) is not None:
        return  # a view reads nothing
    for argument in node.all_input_nodes:
        read = _parameter_read(argument, index)
        if read is None:
            continue
        if not quiet:
            refusals.append(_refuse(node, _REASONS.get(node.target, _NO_TEMPLATE)))
        ops.append(
            Op(
                node=node.name,
                kind="stock",
                operand=index[read.source],
                m=0,
                touched=read.touched,
                other=0,
                flops=0,
                dtype=dtype_name(results[0].dtype),
                module=module_of(node),
                source=source_of(node),
                rewrite=False,
            )
        )


def _parameter_read(argument: Node, index: Mapping[Node, int]) -> Read | None:
    source = input_behind(argument)
    if source is None or source not in index or not parameter_name(source):
        return None
    value = value_of(source)
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return None
    return Read.of(argument, source)


def _refuse(node: Node, reason: str) -> Refusal:
    return Refusal(
        node=node.name,
        target=str(node.target),
        reason=reason,
        module=module_of(node),
        source=source_of(node),
    )


def symbols_of(placeholders: list[Node]) -> tuple[tuple[SymbolSource, ...], dict[str, int]]:
    """Where a call says what the symbols of its sizes are, and their values at compile time."""
    found: dict[str, SymbolSource] = {}
    hints: dict[str, int] = {}

    def note(size: object, placeholder: int, dimension: int | None) -> None:
        if not isinstance(size, torch.SymInt):
            return
        expression = size_of(size)
        if isinstance(expression, int) or not expression.is_Symbol:
            return
        hint = size.node.hint
        if isinstance(hint, torch.SymInt):  # of a nested tensor: it stands for several lengths
            return
        name = str(expression)
        found.setdefault(name, SymbolSource(name, placeholder, dimension))
        if hint is not None:
            hints.setdefault(name, int(hint))

    for position, node in enumerate(placeholders):
        value = value_of(node)
        if isinstance(value, torch.Tensor):
            for dimension, size in enumerate(value.shape):
                note(size, position, dimension)
        else:
            note(value, position, None)
    return tuple(found.values()), hints
