"""Fusing epilogues: what is fused and what is not, equal outputs, and the table kept right."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dak_inductor as dak
from dak_inductor.backend import compile_graph
from dak_inductor.epilogues import MOST_TOKENS, fuse_epilogues
from dak_inductor.normalise import normalise
from dak_inductor.offloaded import record_of
from dak_inductor.op_table import OpTable, build_op_table
from dak_inductor.options import BackendOptions
from dak_inductor.provenance import module_of
from dak_inductor.refusal import Refusal
from dak_inductor.rewrite import rewrite
from dak_inductor.session import SESSION

K, N = 32, 48


class Fused:
    """The one graph that Dynamo makes of a call, rewritten and fused; its output and table."""

    def __init__(self, function: Callable[..., Any], *args: Any, dynamic: bool = False) -> None:
        self.graph: torch.fx.GraphModule
        self.before: OpTable
        self.table: OpTable
        torch._dynamo.reset()
        with torch.no_grad():
            self.output = torch.compile(function, backend=self._backend, dynamic=dynamic)(*args)

    def _backend(self, graph_module, _):
        graph = normalise(graph_module)
        assert not isinstance(graph, Refusal), graph
        self.before = build_op_table(graph)
        self.graph = rewrite(graph, self.before)
        self.table = fuse_epilogues(self.graph, self.before)
        self.graph.graph.lint()
        return self.graph.forward

    @property
    def ops(self) -> Counter:
        """Number of dak:: operators by name."""
        names = [str(node.target) for node in self.graph.graph.nodes]
        return Counter(name.split(".")[1] for name in names if name.startswith("dak."))

    @property
    def epilogues(self) -> list[str]:
        nodes = {op.node: op.epilogue for op in self.table.ops if op.epilogue}
        return list(nodes.values())

    def left(self, *names: str) -> list[str]:
        """Operators of these names that are still in the graph."""
        targets = [str(node.target).split(".") for node in self.graph.graph.nodes]
        return [parts[1] for parts in targets if len(parts) > 1 and parts[1] in names]


def weights(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """As parameters, whose shapes stay static; of a size that leaves sums of about 1."""
    values = (torch.randn(*shape, dtype=dtype).div_(shape[-1] ** 0.5) for shape in shapes)
    return [nn.Parameter(value, requires_grad=False) for value in values]


W, V = weights((N, K), (N, K))
B, C = weights((N,), (N,))
WIDE, WIDE_BIAS = weights((2 * N, K), (2 * N,))
IN_OUT = nn.Parameter(W.t().contiguous(), requires_grad=False)


def new_gelu(y):
    return 0.5 * y * (1.0 + torch.tanh(0.7978845608028654 * (y + 0.044715 * torch.pow(y, 3.0))))


def fast_gelu(y):
    return 0.5 * y * (1.0 + torch.tanh(y * 0.7978845608 * (1.0 + 0.044715 * y * y)))


def erf_gelu(y):
    return y * 0.5 * (1.0 + torch.erf(y / 2**0.5))


def chunked(x):
    gate, up = F.linear(x, WIDE, WIDE_BIAS).chunk(2, dim=-1)
    return F.silu(gate) * up


def split_up_first(x):
    up, gate = F.linear(x, WIDE).split(N, dim=-1)
    return up * F.gelu(gate)


def sliced(x):
    y = F.linear(x, WIDE)
    return F.silu(y[..., :N]) * y[..., N:]


def narrowed(x):
    y = F.linear(x, WIDE)
    return F.silu(y.narrow(-1, 0, N)) * y.narrow(-1, N, N)


def conv1d(x, residual):
    """transformers' Conv1D, with the dropout of evaluation and the residual of gpt2."""
    y = torch.addmm(B, x.view(-1, K), IN_OUT).view(*x.shape[:-1], N)
    return F.dropout(y, 0.1, training=False) + residual


def like_result(x):
    """A tensor of the result's shape that is computed from the input."""
    return x.mean(-1, True).expand(2, 3, N)


def almost_gelu(y):
    return y * 0.5 * (1.0 + torch.tanh(0.79 * (y + 0.0447 * y**3)))


LINEAR = {
    "silu": (lambda x: F.silu(F.linear(x, W, B)), "silu"),
    "silu written out": (lambda x: (y := F.linear(x, W)) * torch.sigmoid(y), "silu"),
    "gelu": (lambda x: F.gelu(F.linear(x, W)), "gelu"),
    "gelu written out": (lambda x: erf_gelu(F.linear(x, W)), "gelu"),
    "gelu tanh": (lambda x: F.gelu(F.linear(x, W), approximate="tanh"), "gelu_tanh"),
    "gelu of gpt2": (lambda x: new_gelu(F.linear(x, W)), "gelu_tanh"),
    "gelu, fast": (lambda x: fast_gelu(F.linear(x, W)), "gelu_tanh"),
    "matmul": (lambda x: F.silu(x @ IN_OUT), "silu"),
    "transposed matmul": (lambda x: F.silu(x @ W.t()), "silu"),
    "view around addmm": (
        lambda x: F.silu(torch.addmm(B, x.view(-1, K), IN_OUT).view(2, 3, N)),
        "silu",
    ),
    "residual": (lambda x: like_result(x) + F.linear(x, W), "residual"),
    "residual after": (lambda x: F.linear(x, W, B) + torch.sin(like_result(x)), "residual"),
    "residual in place": (lambda x: F.linear(x, W).add_(like_result(x)), "residual"),
    "both": (lambda x: F.silu(F.linear(x, W)) + like_result(x), "silu + residual"),
}  # fmt: skip
GATED = {
    "separate": (lambda x: F.silu(F.linear(x, W, B)) * F.linear(x, V, C), "silu(gate) * up"),
    "up first": (lambda x: F.linear(x, V) * F.gelu(F.linear(x, W)), "gelu(gate) * up"),
    "written out": (lambda x: new_gelu(F.linear(x, W)) * F.linear(x, V), "gelu_tanh(gate) * up"),
    "chunk": (chunked, "silu(gate) * up, halves of one weight"),
    "split, up first": (split_up_first, "gelu(gate) * up, halves of one weight"),
    "slices": (sliced, "silu(gate) * up, halves of one weight"),
    "narrow": (narrowed, "silu(gate) * up, halves of one weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", LINEAR)
def test_a_product_takes_its_epilogue(case):
    function, epilogue = LINEAR[case]
    x = torch.randn(2, 3, K)
    fused = Fused(function, x)
    assert fused.ops == {"linear_epilogue": 1}
    assert fused.epilogues == [epilogue]
    assert not fused.left("silu", "gelu", "tanh", "erf", "sigmoid", "add", "add_", "addmm")
    torch.testing.assert_close(fused.output, function(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_follows_many_tokens_is_left_to_inductor(dynamic: bool) -> None:
    """By the tokens of the call that is compiled, where sizes are symbols."""
    function, _ = LINEAR["silu"]
    for rows, fuses in ((MOST_TOKENS // 2, True), (MOST_TOKENS // 2 + 1, False)):
        x = torch.randn(2, rows, K)
        fused = Fused(function, x, dynamic=dynamic)
        assert fused.ops == {"linear_epilogue" if fuses else "linear": 1}
        assert bool(fused.left("silu", "sigmoid")) is not fuses
        torch.testing.assert_close(fused.output, function(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", GATED)
def test_gates_are_fused(case):
    function, epilogue = GATED[case]
    x = torch.randn(2, 3, K)
    fused = Fused(function, x)
    assert fused.ops == {"gated_linear": 1}
    assert fused.epilogues == [epilogue]
    assert not fused.left("silu", "gelu", "mul", "chunk", "split", "narrow", "linear")
    torch.testing.assert_close(fused.output, function(x), rtol=1e-5, atol=1e-5)


def test_gpt2s_projection_takes_its_residual_through_view_and_dropout():
    x, residual = torch.randn(2, 3, K), torch.randn(2, 3, N)
    fused = Fused(conv1d, x, residual)
    assert fused.ops == {"linear_epilogue": 1}
    assert not fused.left("view", "dropout", "add", "addmm")
    torch.testing.assert_close(fused.output, conv1d(x, residual), rtol=1e-6, atol=1e-6)


def overwritten_input(x):
    x = x + 1
    y = F.linear(x, W)
    x.mul_(2)
    return F.silu(y) + x.sum()


def residual_updated_in_place(x):
    kept = like_result(x).clone()
    kept.add_(F.linear(x, W))
    return kept


def used_twice(x):
    y = F.linear(x, W)
    return F.silu(y) + y.sum()


def three_parts(x):
    gate, up, rest = F.linear(x, WIDE).split([N // 2, N // 2, N], dim=-1)
    return (F.silu(gate) * up).sum() + rest.sum()


def gate_half_used_twice(x):
    gate, up = F.linear(x, WIDE).chunk(2, dim=-1)
    return F.silu(gate) * up + gate


def whole_used_too(x):
    y = F.linear(x, WIDE)
    gate, up = y.chunk(2, dim=-1)
    return F.silu(gate) * up + y.sum()


def summed_and_kept(x):
    y = F.linear(x, W)
    return y + like_result(x), y * 2


IN_OUT_WIDE = nn.Parameter(WIDE.t().contiguous(), requires_grad=False)


def halves_of_in_out(x):
    gate, up = (x @ IN_OUT_WIDE).chunk(2, dim=-1)
    return F.silu(gate) * up


def viewed_in_the_residuals_order(x):
    residual = like_result(x).mT.contiguous().mT
    return (residual + F.linear(x, W)).mT.view(-1)


REFUSED = {
    "the product is used twice": used_twice,
    "the result lies in another order": viewed_in_the_residuals_order,
    "a scalar is added": lambda x: F.linear(x, W) + 1.0,
    "the residual is broadcast": lambda x: F.linear(x, W) + C * 2,
    "the residual is larger": lambda x: F.linear(x[:1], W) + like_result(x),
    "alpha": lambda x: torch.add(F.linear(x, W), like_result(x), alpha=2),
    "added to itself": lambda x: (y := F.linear(x, W)) + y,
    "another dtype": lambda x: F.linear(x, W) + like_result(x).double(),
    "the input changes in between": overwritten_input,
    "the residual is updated in place": residual_updated_in_place,
    "another activation": lambda x: F.relu(F.linear(x, W)),
    "two inputs": lambda x: F.sigmoid(F.linear(x, W)) * F.linear(x + 1, V),
    "three parts": three_parts,
    "a half is used twice": gate_half_used_twice,
    "the whole is used besides its halves": whole_used_too,
    "the product is used besides the sum": summed_and_kept,
    "column halves": halves_of_in_out,
    "a computed weight": lambda x: F.silu(F.linear(x, W * 2)),
    "dropout of training": lambda x: F.dropout(F.linear(x, W), 1.0, True) + like_result(x),
    "almost gelu": lambda x: almost_gelu(F.linear(x, W)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_must_not_be_fused_is_left_alone(case):
    function = REFUSED[case]
    x = torch.randn(2, 3, K)
    fused = Fused(function, x)
    assert not fused.ops.keys() & {"linear_epilogue", "gated_linear"}
    assert fused.table.ops == fused.before.ops
    torch.testing.assert_close(fused.output, function(x.clone()), rtol=1e-6, atol=1e-6)


def test_of_two_products_the_later_one_takes_the_sum():
    def function(x):
        early = F.linear(x, W)
        return early + F.linear(torch.sin(early.mean(-1, True)).expand(2, 3, K), V)

    def parallel(x):
        return F.linear(x, W) + F.linear(x, V, B)

    x = torch.randn(2, 3, K)
    fused = Fused(parallel, x)
    assert fused.ops == {"linear": 1, "linear_epilogue": 1}
    torch.testing.assert_close(fused.output, parallel(x), rtol=0, atol=0)
    fused = Fused(function, x)  # the early product is used twice, but it may be the residual
    assert fused.ops == {"linear": 1, "linear_epilogue": 1}
    torch.testing.assert_close(fused.output, function(x), rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_table_keeps_bytes_flops_and_rows(dynamic):
    def block(x, residual):
        gated = F.silu(F.linear(x, W, B)) * F.linear(x, V)
        halves = chunked(x)
        return F.linear(gated + halves, IN_OUT) + residual

    x, residual = torch.randn(2, 3, K), torch.randn(2, 3, K)
    fused = Fused(block, x, residual, dynamic=dynamic)
    names = {index: f"t{index}" for index in fused.table.operands()}
    uses = fused.table.uses(names, graph="g", calls=1)
    before = fused.before.uses(names, graph="g", calls=1)
    assert sum(use.flops for use in uses) == sum(use.flops for use in before)
    for tensor in names.values():
        assert sum(u.touched_bytes for u in uses if u.tensor == tensor) == sum(
            u.touched_bytes for u in before if u.tensor == tensor
        )
    assert {use.m for use in uses} == {6}
    by_kind = Counter(use.kind for use in uses)
    assert by_kind == {"gated_linear": 3, "linear_epilogue": 1}, "two inputs, one input twice"
    one_byte_row = 4 * 6
    (last,) = [use for use in uses if use.kind == "linear_epilogue"]
    assert last.other_bytes == one_byte_row * (N + K + K)
    gates = [use for use in uses if use.kind == "gated_linear"]
    assert sorted(use.other_bytes for use in gates) == [0, *[one_byte_row * (K + N)] * 2]
    order = [node.name for node in fused.graph.graph.nodes]
    positions = [order.index(use.op) for use in uses]
    assert positions == sorted(positions)


def test_the_fused_node_keeps_the_products_module_and_the_results_value():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(K, N)
            self.act = nn.SiLU()

        def forward(self, x):
            return self.act(self.up(x))

    fused = Fused(Net().requires_grad_(False), torch.randn(2, K))
    (node,) = [n for n in fused.graph.graph.nodes if "linear_epilogue" in str(n.target)]
    assert module_of(node) == "up"
    assert tuple(node.meta["val"].shape) == (2, N)
    assert {op.module for op in fused.table.ops} == {"up"}
    assert all(
        "test_epilogues.py" in op.source or "linear.py" in op.source for op in fused.table.ops
    )


class Gated(nn.Module):
    """A gated block with a residual: every weight read once by a fused operator."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(K, N), nn.Linear(K, N)
        self.down = nn.Linear(N, K)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def test_gate_and_up_are_counted_and_explained_through_the_pipeline():
    SESSION.reset()
    model = nn.Sequential(Gated(), Gated())
    x = torch.randn(4, K)
    with torch.no_grad():
        expected = model(x)
    dak.offload(model, offload_ratio=0.5, remote="simulated")
    executor = functools.partial(
        compile_graph, settings=BackendOptions(), executor=lambda graph, _: graph.forward
    )
    dak.stats(reset=True)
    with torch.no_grad():
        result = torch.compile(model, backend=executor)(x)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    record = record_of(model)
    assert record is not None
    read = dak.stats()
    assert {count.kind for count in read.reads} == {"gated_linear", "linear_epilogue"}
    held = {name: w.buffer.bytes_by_tier() for name, w in record.weights.items()}
    assert {c.tensor: c.bytes for c in read.reads} == held
    assert read.total.remote > 0
    explained = dak.explain(model)
    assert [op.kind for op in explained.templates] == ["gated_linear", "linear_epilogue"] * 2
    assert {op.template for op in explained.templates} == {"simulated"}
    assert {op.epilogue for op in explained.templates} == {"silu(gate) * up", "residual"}
    assert "silu(gate) * up" in str(explained)
    uses = Counter(op.op for op in explained.plan.ops if op.kind == "gated_linear")
    assert sorted(uses.values()) == [2, 2]


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_compiles_the_fused_graph(dynamic):
    SESSION.reset()
    model = Gated()
    reference = Gated()
    reference.load_state_dict(model.state_dict())
    dak.offload(model, offload_ratio=0.5, remote="simulated")
    compiled = torch.compile(model, backend="dak", dynamic=dynamic)
    dak.stats(reset=True)
    with torch.no_grad():
        for rows in (4, 7) if dynamic else (4,):
            x = torch.randn(rows, K)
            torch.testing.assert_close(compiled(x), reference(x), rtol=1e-5, atol=1e-5)
    assert {count.kind for count in dak.stats().reads} == {"gated_linear", "linear_epilogue"}
