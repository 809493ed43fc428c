"""The operator table: kinds, bytes and flops by arithmetic, in the graph's symbols; refusals with
reasons."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dak_inductor.normalise import normalise
from dak_inductor.op_table import OpTable, build_op_table
from dak_inductor.refusal import Refusal


def table_of(function: Callable[..., object], *args: object, dynamic: bool = False) -> OpTable:
    """The table of the one graph that Dynamo makes of a call."""
    tables: list[OpTable] = []

    def record(graph_module, _):
        graph = normalise(graph_module)
        assert not isinstance(graph, Refusal), graph
        tables.append(build_op_table(graph))
        return graph_module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=record, dynamic=dynamic)(*args)
    (table,) = tables
    return table


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def uses_by_kind(table: OpTable, **values: int):
    names = {index: f"t{index}" for index in table.operands()}
    return {use.kind: use for use in table.uses(names, graph="g", calls=1, values=values)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_counts_weight_bytes_flops_and_rows(dtype):
    layer = frozen(nn.Linear(64, 96, dtype=dtype))
    table = table_of(layer, torch.randn(2, 5, 64, dtype=dtype))
    use = uses_by_kind(table)["linear"]
    size = torch.finfo(dtype).bits // 8
    assert use.touched_bytes == 64 * 96 * size
    assert use.m == 10
    assert use.flops == 2 * 10 * 64 * 96
    assert use.other_bytes == (10 * 64 + 10 * 96) * size
    assert use.dtype == str(dtype).removeprefix("torch.")
    assert table.parameters[table.ops[0].operand] == "weight"


def test_all_spellings_of_a_product_are_found():
    weight = torch.randn(32, 48)

    def spellings(x):
        return (
            F.linear(x, weight.t()),
            x @ weight,
            torch.matmul(x, weight),
            torch.mm(x, weight),
            torch.addmm(torch.zeros(48), x, weight),
            torch.nn.functional.linear(x, weight.t(), torch.ones(48)),
        )

    table = table_of(spellings, torch.randn(3, 32))
    kinds = [op.kind for op in table.ops]
    assert sorted(kinds) == ["addmm", "linear", "linear", "matmul", "matmul", "matmul"]
    assert all(op.rewrite for op in table.ops)
    assert {use.touched_bytes for use in uses_by_kind(table).values()} == {32 * 48 * 4}


def test_sizes_stay_symbolic_and_are_read_from_the_call():
    layer = frozen(nn.Linear(16, 8, bias=False))
    table = table_of(layer, torch.randn(7, 16), dynamic=True)
    (op,) = table.ops
    assert not isinstance(op.m, int)
    index = next(
        i
        for i, name in enumerate(table.placeholders)
        if i not in table.parameters and any(s.placeholder == i for s in table.symbols)
    )
    arguments: list[object] = [None] * len(table.placeholders)
    arguments[index] = 5 if table.symbols[0].dimension is None else torch.empty(5, 16)
    values = table.symbol_values(arguments)
    (use,) = table.uses({op.operand: "w"}, graph="g", calls=1, values=values)
    assert use.m == 5
    assert use.flops == 2 * 5 * 16 * 8
    (hinted,) = table.uses({op.operand: "w"}, graph="g", calls=1)
    assert hinted.m == 7


def test_an_embedding_touches_no_more_rows_than_it_has_indices():
    table = table_of(frozen(nn.Embedding(1000, 64)), torch.arange(6).view(2, 3))
    assert uses_by_kind(table)["embedding"].touched_bytes == 6 * 64 * 4
    small = table_of(frozen(nn.Embedding(4, 64)), torch.zeros(3, 9, dtype=torch.long))
    assert uses_by_kind(small)["embedding"].touched_bytes == 4 * 64 * 4


def test_indexed_experts_touch_only_what_is_indexed():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 16, 32), requires_grad=False)

        def forward(self, x, chosen):
            return torch.bmm(x.unsqueeze(1), self.weight[chosen])

    table = table_of(Experts(), torch.randn(3, 16), torch.tensor([1, 5, 1]))
    use = uses_by_kind(table)["gather"]
    assert use.touched_bytes == 3 * 16 * 32 * 4


def test_attention_over_a_cache_reads_keys_and_values():
    def step(q, keys, values, k, v, position):
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        return F.scaled_dot_product_attention(q, keys, values)

    keys, values = torch.zeros(2, 4, 32, 8), torch.zeros(2, 4, 32, 8)
    token = torch.randn(2, 4, 1, 8)
    table = table_of(step, token, keys, values, token, token, torch.tensor([3]))
    ops = [op for op in table.ops if op.kind == "attention"]
    assert len({op.operand for op in ops}) == 2
    assert sum(op.touched for op in ops) == keys.nbytes + values.nbytes
    assert sum(op.flops for op in ops) == 2 * 2 * 4 * 1 * 32 * (8 + 8)
    assert all(op.rewrite for op in ops)


def test_refusals_say_why_and_where():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.proj = nn.Linear(8, 8)

        def forward(self, x):
            y = self.conv(x).mean((2, 3))
            return F.scaled_dot_product_attention(y[None], y[None], y[None]) + self.proj(y)

    table = table_of(frozen(Net()), torch.randn(2, 3, 9, 9))
    reasons = {refusal.target: refusal for refusal in table.refusals}
    conv = reasons["aten.conv2d.default"]
    assert "stock kernel" in conv.reason
    assert conv.module == "conv"
    assert conv.source.split(":")[0].endswith("test_op_table.py")
    assert "no cache" in reasons["aten.scaled_dot_product_attention.default"].reason
    stock = [op for op in table.ops if op.kind == "stock"]
    assert [table.parameters[op.operand] for op in stock] == ["conv.weight"]
    assert stock[0].touched == 8 * 3 * 9 * 4


def test_a_product_of_two_activations_is_no_business_of_ours():
    table = table_of(lambda x: (x + 1) @ (x + 2).t(), torch.randn(4, 4))
    assert not table.ops
    assert not table.refusals


def test_a_weight_updated_in_place_is_not_rewritten():
    def step(x, cache):
        cache.add_(1)
        return (x + 1) @ cache

    table = table_of(step, torch.randn(4, 4), torch.randn(4, 4))
    assert not any(op.rewrite for op in table.ops)


def test_building_the_table_of_2000_products_is_fast():
    import time

    layer = frozen(nn.Linear(8, 8, bias=False))

    def deep(x):
        for _ in range(2000):
            x = F.linear(x, layer.weight)
        return x

    graphs = []
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(deep, backend=lambda g, _: graphs.append(normalise(g)) or g.forward)(
            torch.randn(2, 8)
        )
    start = time.perf_counter()
    table = build_op_table(graphs[0])
    elapsed = time.perf_counter() - start
    assert len(table.ops) == 2000
    assert elapsed < 1.0, f"{elapsed:.2f} s"
