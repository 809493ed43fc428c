"""What a graph does on activations alone, beside the operators that read weights or caches.

Attention over keys that the graph computes, products of two activations and convolutions are
kernels of their own. All else is pointwise or reduces, and Inductor makes few kernels of it: one,
it is taken here, of what is connected without such a kernel in between. Each reads what comes from
outside once and writes what is used outside.

No plan moves these bytes. They are as long as a tenth to a third of a prefill, in which the link
copies ahead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import itemgetter
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from dak_inductor.attention_match import attention_flops
from dak_inductor.cost_model import FUSED
from dak_inductor.normalise import value_of
from dak_inductor.op_match import dtype_name, nbytes
from dak_inductor.provenance import module_of, source_of
from dak_inductor.sizes import Size, add, minimum, product, shape_of
from dak_inductor.views import changes_not, memory_behind, writes_first

_aten = torch.ops.aten

ATTENTION = "attention"
_SHAPED = frozenset({_aten.contiguous.default, _aten.flatten.using_ints, _aten.reshape.default})
"""Views or copies, as the layout has it; a copy is fused with its neighbours."""
_CASTS = frozenset({_aten.to.dtype, _aten.to.dtype_layout, _aten.to.device})


@dataclass(frozen=True, slots=True)
class LocalOp:
    """One kernel on activations.

    kind:   "attention", "matmul", "convolution", or "fused" for all that Inductor makes one
            kernel of.
    after:  the last operator of the graph's table before it, by node; "" for none.
    other:  bytes read and written per call.
    flops:  per call.
    """

    operand: ClassVar[int] = -1  # of the graph's inputs; it reads none that may be in a tier
    rewrite: ClassVar[bool] = False
    touched: ClassVar[int] = 0
    m: ClassVar[int] = 0
    n: ClassVar[int] = 0

    node: str
    kind: str
    after: str
    other: Size
    flops: Size
    dtype: str
    module: str
    source: str


def local_ops(graph_module: GraphModule, known: Mapping[str, str]) -> tuple[LocalOp, ...]:
    """Those of a graph in their order; `known` has the kinds of all others by node."""
    return _Reader(graph_module, known).found()


class _Reader:
    """Goes through the nodes once. The `depth` of one is the number of kernels on the longest way
    to it; fused nodes of one depth that are connected are one kernel."""

    def __init__(self, graph_module: GraphModule, known: Mapping[str, str]) -> None:
        self._nodes = list(graph_module.graph.nodes)
        self._known = known
        self._depth: dict[Node, int] = {}
        self._leader: dict[Node, Node] = {}  # of fused nodes: one of the same kernel, or itself

    def found(self) -> tuple[LocalOp, ...]:
        """The kernels, each where the last of its nodes is."""
        own: list[tuple[Node, LocalOp]] = []
        after = ""
        places: dict[Node, str] = {}
        for node in self._nodes:
            places[node] = after
            inputs = [self._behind(each) for each in node.all_input_nodes]
            depth = max((self._after(each) for each in inputs), default=0)
            self._depth[node] = depth
            if node.op != "call_function":
                continue
            if node.name in self._known:
                after = node.name
            elif self._behind(node) is not node or not _is_stored(node):
                continue
            elif (kind := _KERNELS.get(node.target)) is not None:
                own.append((node, _kernel(node, kind, places[node])))
            else:
                self._fuse(node, inputs)
        groups: dict[Node, list[Node]] = {}
        for node in self._leader:
            groups.setdefault(self._leading(node), []).append(node)
        for group in groups.values():
            own.append((group[-1], self._fused(group, places[group[-1]])))
        return tuple(op for _, op in sorted(own, key=itemgetter(0)))

    def _after(self, node: Node) -> int:
        """The depth of what reads it."""
        is_kernel = node.name in self._known or node.target in _KERNELS
        return self._depth.get(node, 0) + is_kernel

    def _fuse(self, node: Node, inputs: Iterable[Node]) -> None:
        self._leader[node] = node
        for each in inputs:
            if each in self._leader and self._depth[each] == self._depth[node]:
                self._leader[self._leading(each)] = node

    def _behind(self, node: Node) -> Node:
        """The node whose result it shows without a copy."""
        while self._is_view(node):
            node = node.args[0]  # type: ignore[assignment]
        return node

    def _is_view(self, node: Node) -> bool:
        if node.op != "call_function" or node.name in self._known:
            return False
        first = node.args[0] if node.args else None
        if not isinstance(first, Node):
            return False
        if node.target in _SHAPED:
            return self._is_attention(self._behind(first)) or _shares(first, node)
        if node.target in _CASTS:
            return changes_not(node)
        return not writes_first(node) and memory_behind(node) is not node

    def _is_attention(self, node: Node) -> bool:
        """Stock kernels write the heads of a token beside each other; on the meta device their
        results look otherwise."""
        return ATTENTION in (self._known.get(node.name), _KERNELS.get(node.target))

    def _readers(self, node: Node) -> Iterator[Node]:
        """Whoever reads its memory, views followed."""
        for user in node.users:
            if self._is_view(user) and user.args[0] is node:
                yield from self._readers(user)
            else:
                yield user

    def _leading(self, node: Node) -> Node:
        while (above := self._leader[node]) is not node:
            self._leader[node] = self._leader[above]
            node = above
        return node

    def _fused(self, group: list[Node], after: str) -> LocalOp:
        """`group` in the graph's order."""
        inside, last = set(group), group[-1]
        moved: Size = 0
        read: dict[Node, Size] = {}
        for node in group:
            operands = node.all_input_nodes
            written = writes_first(node)
            for operand in operands[written:]:
                source = self._behind(operand)
                if source not in inside and _is_stored(source):
                    read[source] = add(read.get(source, 0), _bytes(operand))
            if written:
                moved = add(moved, _changed(operands))
            elif any(user not in inside for user in self._readers(node)):
                moved = add(moved, _bytes(node))
        for source, seen in read.items():
            moved = add(moved, minimum(seen, _bytes(source)))
        return LocalOp(
            last.name, FUSED, after, moved, 0, dtype_name(_results(last)[0].dtype),
            module_of(last), source_of(last),
        )  # fmt: skip


def _changed(operands: list[Node]) -> Size:
    """Bytes that an operator writes to the memory of its first operand."""
    target = _results(operands[0])
    own = [v for each in operands[1:] for v in _results(each) if v.dtype == target[0].dtype]
    return nbytes(own[-1]) if own else _bytes(operands[0])


def _shares(operand: Node, node: Node) -> bool:
    values = [*_results(operand), *_results(node)]
    return len({value.untyped_storage()._cdata for value in values}) == 1


def _results(node: Node) -> list[torch.Tensor]:
    leaves = tree_leaves(value_of(node))
    return [v for v in leaves if isinstance(v, torch.Tensor) and v.layout == torch.strided]


def _bytes(node: Node) -> Size:
    return reduce(add, map(nbytes, _results(node)), 0)


def _is_stored(node: Node) -> bool:
    """What is made of nothing, such as an arange, is made again where it is read."""
    made = node.op == "call_function" and not node.all_input_nodes
    return bool(_results(node)) and not made


def _kernel(node: Node, kind: str, after: str) -> LocalOp:
    moved = _bytes(node)
    for operand in node.all_input_nodes:
        moved = add(moved, minimum(_bytes(operand), _bytes(memory_behind(operand))))
    return LocalOp(
        node.name, kind, after, moved, _FLOPS[kind](node), dtype_name(_results(node)[0].dtype),
        module_of(node), source_of(node),
    )  # fmt: skip


def _attention_flops(node: Node) -> Size:
    query, key, value = (value_of(argument) for argument in node.args[:3])
    causal = node.kwargs.get("is_causal", node.args[5] if len(node.args) > 5 else False)
    return attention_flops(query, key, value, shape_of(key)[-2], causal=bool(causal))


def _matmul_flops(node: Node) -> Size:
    left = node.args[1] if node.target in _WITH_SUM else node.args[0]
    return product((2, *shape_of(value_of(node)), shape_of(value_of(left))[-1]))


def _convolution_flops(node: Node) -> Size:
    """Of one that is not transposed."""
    weight = shape_of(value_of(node.args[1]))
    return product((2, *shape_of(value_of(node)), *weight[1:]))


_FLOPS = {
    ATTENTION: _attention_flops,
    "matmul": _matmul_flops,
    "convolution": _convolution_flops,
}
_WITH_SUM = frozenset({_aten.addmm.default, _aten.baddbmm.default})
_KERNELS: dict[Any, str] = {
    _aten.scaled_dot_product_attention.default: ATTENTION,
    **dict.fromkeys(
        (
            _aten.linear.default, _aten.matmul.default, _aten.mm.default, _aten.bmm.default,
            *_WITH_SUM,
        ),
        "matmul",
    ),
    **dict.fromkeys(
        (
            _aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default,
            _aten.convolution.default,
        ),
        "convolution",
    ),
}  # fmt: skip
