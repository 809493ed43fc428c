"""Products with a parameter in rare spellings: bytes by tier, eager's values and strides."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dak_inductor as dak
from dak_inductor.normalise import normalise
from dak_inductor.offloaded import record_of
from dak_inductor.session import SESSION

from .program_check import assert_close
from .test_backend import backend, call
from .test_op_table import table_of


class Spelled(nn.Module):
    """`function` of the inputs and of weights with these shapes."""

    def __init__(self, function, *shapes):
        super().__init__()
        weights = (torch.randn(shape) / 8 for shape in shapes)
        self.weights = nn.ParameterList(nn.Parameter(w, requires_grad=False) for w in weights)
        self.function = function

    def forward(self, *inputs):
        weights = [self.weights[index] for index in range(len(self.weights))]
        return self.function(*inputs, *weights)


def einsum(equation):
    return lambda x, *weights: torch.einsum(equation, x, *weights)


MATRIX = [
    (einsum("bsd,df->bsf"), [(2, 5, 64)], [(64, 96)]),
    (einsum("bsd,fd->bsf"), [(2, 5, 64)], [(96, 64)]),
    (einsum("...d,df"), [(2, 5, 64)], [(64, 96)]),
    (einsum("bsd,df->bfs"), [(2, 5, 64)], [(64, 96)]),
    (einsum("d,df->f"), [(64,)], [(64, 96)]),
    (einsum("bsd,dhk->bshk"), [(2, 5, 64)], [(64, 4, 24)]),
    (einsum("bsd,dhk->bhsk"), [(2, 5, 64)], [(64, 4, 24)]),
    (einsum("bsd,dhk->bskh"), [(2, 5, 64)], [(64, 4, 24)]),
    (einsum("bsd,hkd->bshk"), [(2, 5, 64)], [(4, 24, 64)]),
    (einsum("bshk,hkd->bsd"), [(2, 5, 4, 24)], [(4, 24, 64)]),
    (einsum("bhsk,hkd->bsd"), [(2, 4, 5, 24)], [(4, 24, 64)]),
    (lambda x, w: torch.einsum("df,bsd->bsf", w, x), [(2, 5, 64)], [(64, 96)]),
    (lambda x, w: torch.einsum(x, [0, 1], w, [1, 2], [0, 2]), [(5, 64)], [(64, 96)]),
    (lambda x, w: torch.tensordot(x, w, dims=1), [(2, 5, 64)], [(64, 96)]),
    (lambda x, w: torch.tensordot(x, w, dims=([2, 3], [0, 1])), [(2, 5, 4, 24)], [(4, 24, 64)]),
    (lambda x, w: torch.tensordot(w, x, dims=([0], [2])), [(2, 1, 512)], [(512, 1024)]),
    (torch.inner, [(2, 5, 64)], [(96, 64)]),
    (torch.linalg.matmul, [(2, 5, 64)], [(64, 96)]),
    (lambda x, w: torch.mv(w, x), [(64,)], [(96, 64)]),
    (lambda x, w: w @ x, [(64,)], [(96, 64)]),
    (lambda x, w: w @ x, [(512, 2)], [(1024, 512)]),
    (lambda x, w: w @ x, [(64, 1)], [(96, 64)]),
    (lambda x, w: w @ x, [(2, 512, 2)], [(1024, 512)]),
    (lambda x, w: w @ x, [(2, 64, 1)], [(96, 64)]),
    (lambda x, y, w: torch.addmv(y, w, x), [(64,), (96,)], [(96, 64)]),
    (lambda x, w: torch.bmm(x, w.expand(3, -1, -1)), [(3, 5, 64)], [(64, 96)]),
    (lambda x, w: F.bilinear(x, x, w), [(5, 32)], [(24, 32, 32)]),
    (F.linear, [(64,)], [(96, 64)]),
    (lambda x, w: x @ w.reshape(64, -1), [(5, 64)], [(64, 4, 24)]),
    (lambda x, w: x @ w.flatten(1), [(5, 64)], [(64, 4, 24)]),
    (lambda x, w: x @ w.contiguous(), [(5, 64)], [(64, 96)]),
    (lambda x, w: torch.einsum("cd,cfe->dfe", x, w.permute(0, 2, 1)), [(32, 5)], [(32, 4, 24)]),
]
STACKS = [
    (einsum("ecd,edf->ecf"), [(4, 3, 32)], [(4, 32, 48)]),
    (einsum("ecd,efd->ecf"), [(4, 3, 32)], [(4, 48, 32)]),
    (einsum("becd,edf->becf"), [(2, 4, 3, 32)], [(4, 32, 48)]),
    (einsum("bsd,edf->bsef"), [(2, 5, 32)], [(4, 32, 48)]),
    (einsum("bsd,hdk->bhsk"), [(2, 5, 32)], [(4, 32, 48)]),
]
CASES = [(*case, {"linear", "addmm", "matmul"}) for case in MATRIX] + [
    (*case, {"matmul"}) for case in STACKS
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("function", "inputs", "weights", "kinds"), CASES)
def test_every_weight_byte_is_read_once_by_an_operator_of_ours(
    function, inputs, weights, kinds, dtype
):
    SESSION.reset()
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Spelled(function, *weights).to(dtype)
    values = [torch.randn(shape, dtype=dtype) for shape in inputs]
    expected = call(model, *values)
    exact = call(copy.deepcopy(model).double(), *[value.double() for value in values])
    dak.offload(model, offload_ratio=0.5, remote="simulated")
    dak.stats(reset=True)
    result = call(torch.compile(model, backend=backend()), *values)
    assert_close(result, expected, exact)
    held = record_of(model).bytes_by_tier()
    assert held.remote > 0
    assert dak.stats().total == held
    assert {read.kind for read in dak.stats().reads} <= kinds
    (binding,) = SESSION.bindings()
    assert not binding.table.refusals


@pytest.mark.parametrize("case", MATRIX[:12])
def test_a_product_with_a_matrix_has_the_weight_as_a_matrix(case):
    """What the kernels take: 2-D, so rows are those of the activation."""
    function, inputs, weights = case
    table = table_of(Spelled(function, *weights), *map(torch.randn, inputs))
    rows = {op.m for op in table.ops}
    assert rows == {torch.Size(inputs[0]).numel() // _contracted(inputs[0], weights[0])}


def _contracted(x, weight):
    shared = set(x) & set(weight)
    return torch.Size(n for n in weight if n in shared).numel()


def test_rows_stay_symbolic():
    model = Spelled(einsum("bsd,dhk->bhsk"), (64, 4, 24))
    torch._dynamo.reset()
    SESSION.reset()
    resident = copy.deepcopy(model)
    dak.offload(model, offload_ratio=0.5, remote="simulated")
    compiled = torch.compile(model, backend=backend(), dynamic=True)
    for rows in (3, 7, 5):
        x = torch.randn(2, rows, 64)
        dak.stats(reset=True)
        torch.testing.assert_close(call(compiled, x), call(resident, x))
        assert dak.stats().total == record_of(model).bytes_by_tier()
        assert dak.stats().total.remote > 0
    (binding,) = SESSION.bindings()
    assert binding.calls == 3


def test_what_reads_no_parameter_stays_as_it_was():
    def attend(x, w):
        y = torch.einsum("bqd,bkd->bqk", x + 1, x + 2)
        return torch.tensordot(y, y.mT + 1, dims=([0, 1], [0, 2])).sum() + F.linear(x, w)

    table = table_of(Spelled(attend, (96, 64)), torch.randn(2, 5, 64))
    assert [op.kind for op in table.ops] == ["linear"]
    assert not table.refusals


STOCK = [
    (einsum("bd,dd->b"), [(5, 64)], [(64, 64)]),
    (einsum("bd,ef->bd"), [(5, 64)], [(64, 96)]),
    (einsum("bd,df,fg->bg"), [(5, 64)], [(64, 96), (96, 32)]),
    (lambda x, v, w: torch.einsum("bd,df->bf", v, w) + x, [(32, 96)], [(32, 64), (64, 96)]),
    (lambda x, y, w: torch.baddbmm(y, x, w), [(4, 3, 64), (4, 3, 32)], [(4, 64, 32)]),
    (lambda x, w: torch.tensordot(w, x, dims=([0], [0])), [(64, 5)], [(64, 96)]),
]
ON_THE_LEFT = [
    (lambda x, w: w @ x, [(64, 5)], [(96, 64)]),
    (lambda x, w: w @ x, [(2, 64, 5)], [(96, 64)]),
    (lambda x, w: torch.bmm(w, x), [(4, 32, 5)], [(4, 48, 32)]),
    (lambda x, y, w: torch.addmm(y, w, x), [(64, 5), (96, 1)], [(96, 64)]),
]


@pytest.mark.parametrize(
    ("function", "inputs", "weights", "kind"),
    [(*case, "stock") for case in STOCK]
    + [(*case, "matmul") for case in ON_THE_LEFT[:3]]
    + [(*ON_THE_LEFT[3], "addmm")],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_what_would_take_copies_or_is_not_one_product_says_why(
    function, inputs, weights, kind, dynamic
):
    SESSION.reset()
    torch._dynamo.reset()
    model = Spelled(function, *weights)
    values = [torch.randn(shape) for shape in inputs]
    expected = call(model, *values)
    dak.offload(model, offload_ratio=0.5, remote="simulated")
    dak.stats(reset=True)
    result = call(torch.compile(model, backend=backend(), dynamic=dynamic), *values)
    torch.testing.assert_close(result, expected)
    held = record_of(model).bytes_by_tier()
    assert held.remote > 0
    assert dak.stats().total == held
    (binding,) = SESSION.bindings()
    assert {op.kind for op in binding.table.ops} == {kind}
    assert not any(op.rewrite for op in binding.table.ops)
    assert "stock kernel reads" in str(dak.explain(model).plan.refusals)


@pytest.mark.parametrize("case", MATRIX + STACKS)
def test_weights_that_are_not_offloaded_stay_as_they_are_spelled(case, monkeypatch):
    seen = []

    def plain(graph_module):
        return [node.target for node in graph_module.graph.nodes if node.op == "call_function"]

    def watched(graph_module, **options):
        graph = normalise(graph_module, **options)
        with monkeypatch.context() as patch:
            patch.setattr("dak_inductor.normalise.respellings", lambda *_, **__: {})
            seen.append((plain(graph), plain(normalise(graph_module))))
        return graph

    monkeypatch.setattr("dak_inductor.backend.normalise", watched)
    torch._dynamo.reset()
    function, inputs, weights = case
    model = Spelled(function, *weights)
    call(torch.compile(model, backend=backend()), *map(torch.randn, inputs))
    ((graph, untouched),) = seen
    assert graph == untouched


def test_under_autocast_tensordot_keeps_the_widest_dtype():
    def promoted(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            return torch.tensordot(x, w, dims=1), torch.einsum("bd,df->bf", x, w)

    table = table_of(Spelled(promoted, (64, 96)), torch.randn(5, 64))
    assert sorted(op.kind for op in table.ops) == ["matmul", "stock"]


def test_a_parameter_on_the_left_is_the_weight_though_the_other_is_an_input():
    table = table_of(Spelled(lambda x, w: w @ x, (4, 96, 64)), torch.randn(2, 1, 64, 5))
    (op,) = table.ops
    assert table.parameters[op.operand]
    assert op.touched == 4 * 96 * 64 * 4
