"""Divided weights that no operator of ours reads: counted, explained, no cause for a warning."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dak_inductor as dak
from dak_inductor.errors import BudgetError, ModelError
from dak_inductor.offloaded import record_of
from dak_inductor.session import SESSION

from .test_backend import backend, call


class Dequantised(nn.Module):
    def __init__(self):
        super().__init__()
        weight = torch.randint(-100, 100, (128, 128), dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Pieces(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(192, 64))

    def forward(self, x):
        query, key, value = self.weight.chunk(3)
        first, _ = self.weight.split([100, 92])
        return F.linear(x, query) * F.linear(x, key) + F.linear(x, value), F.linear(x, first)


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(500, 64)
        self.out = nn.Linear(64, 64)

    def forward(self, x):
        return self.out(self.bag(x.abs().long()[:, :3]))


class Mapped(nn.Module):
    """Torch 2.13 cannot trace its graph to ATen again, since vmap holds its tensors; 2.11 can."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(500, 64)
        self.out = nn.Linear(64, 96)

    def forward(self, x):
        return torch.vmap(self.out)(x) + self.rows(x[:, :2].abs().long()).sum()


def run(model: nn.Module, x: torch.Tensor, ratio: float = 0.5) -> None:
    """Compile it offloaded, without a warning and with eager's output."""
    SESSION.reset()
    torch._dynamo.reset()
    expected = call(model, x)
    dak.offload(model, offload_ratio=ratio, remote="simulated")
    dak.stats(reset=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = call(torch.compile(model, backend=backend()), x)
    torch.testing.assert_close(result, expected)


def conv() -> nn.Module:
    return nn.Conv1d(32, 64, 3, padding=1)


@pytest.mark.parametrize("make", [Dequantised, conv])
def test_the_simulated_tier_counts_what_stock_operators_read(make):
    model = make()
    x = torch.randn(2, 32, 128) if isinstance(model, nn.Conv1d) else torch.randn(4, 128)
    run(model, x)
    record = record_of(model)
    assert record is not None
    assert dak.stats().total == record.bytes_by_tier()
    assert {read.kind for read in dak.stats().reads} == {"stock"}


def test_reads_of_stock_operators_are_counted_when_the_model_is_restored():
    model, x = conv(), torch.randn(2, 32, 128)
    run(model, x)
    compiled = torch.compile(model, backend=backend())
    record = record_of(model)
    assert record is not None
    read = record.bytes_by_tier()
    dak.stats(reset=True)
    for _ in range(3):
        call(compiled, x)
    del record
    dak.restore(model)
    total = dak.stats().total
    assert (total.local, total.remote) == (3 * read.local, 3 * read.remote), "nobody asked before"


def test_products_with_the_pieces_of_a_split_weight_are_served():
    model = Pieces()
    run(model, torch.randn(4, 64))
    explanation = dak.explain(model)
    assert not explanation.plan.refusals
    assert {read.kind for read in dak.stats().reads} <= {"linear", "linear_epilogue"}
    assert dak.stats().total.total == (192 + 100) * 64 * 4


def test_an_operator_of_many_results_reads_its_table():
    model = Bag()
    run(model, torch.randn(4, 64) * 10)
    kinds = {read.kind: read.bytes for read in dak.stats().reads}
    assert kinds["stock"].remote > 0
    assert "embedding_bag" in str(dak.explain(model))


def test_a_graph_with_vmap_is_counted_and_says_why_it_is_left_as_it_is():
    model = Mapped()
    run(model, torch.randn(4, 64))
    (binding,) = SESSION.bindings()
    text = str(dak.explain(model))
    if "whole graph" not in text:
        calls = {read.kind: read.calls for read in dak.stats().reads}
        assert calls == {"linear": 4, "embedding": 1}  # vmap calls an operator for each of 4 rows
        return
    touched = {binding.names[op.operand]: op.touched for op in binding.table.ops}
    assert touched == {"rows.weight": 8 * 64 * 4, "out.weight": 64 * 96 * 4}
    assert dak.stats().total.remote > 0
    assert "1 graph seen" in text
    assert "a function transform (vmap, a scan)" in text


def test_buffers_that_are_divided_count_among_the_tensors(capsys):
    model = nn.Linear(64, 64)
    model.register_buffer("table", torch.zeros(1 << 22))
    dak.offload(model, offload_ratio=0.5, remote="simulated")
    assert "2 of 3 tensors tiered" in capsys.readouterr().out


def test_what_cannot_be_divided_is_named_for_what_it_is():
    model = nn.Module()
    model.register_buffer("weight", torch.zeros(256, 256))
    with pytest.raises(ModelError, match=r"largest buffer 262,144; .* buffers below 16,777,216"):
        dak.offload(model, offload_ratio=0.5, remote="simulated")
    with pytest.raises(ModelError, match="TorchScript"):
        scripted = torch.jit.script(nn.Linear(64, 64))
        dak.offload(scripted, offload_ratio=0.5, remote="simulated")
    with pytest.raises(BudgetError, match="a smaller offload_ratio"):
        pinned = {"*": "gpu"}
        dak.offload(nn.Linear(64, 64), offload_ratio=0.5, remote="simulated", placement=pinned)


def test_explain_says_which_weights_were_replaced():
    model = dak.offload(nn.Linear(64, 64), offload_ratio=0.5, remote="simulated")
    assert "replaced" not in str(dak.explain(model))
    model.half()
    explanation = dak.explain(model)
    assert explanation.replaced == ("weight",)
    text = " ".join(str(explanation).split())
    assert "on the device, so that nothing of them is offloaded: weight" in text
