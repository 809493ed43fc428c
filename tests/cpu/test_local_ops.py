"""What a graph does beside the operators that read weights or caches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dak_inductor.capture import capture
from dak_inductor.local_ops import LocalOp
from dak_inductor.op_table import OpTable
from dak_inductor.sizes import Evaluator

ROWS, WIDTH = 8, 64
ACTIVATION = ROWS * WIDTH * 2  # bytes, bf16


def meta(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*sizes, dtype=dtype, device="meta")


def table_of(function, *args) -> OpTable:
    (table,) = capture(function, *args)
    return table


def values(table: OpTable, op: LocalOp) -> tuple[int, int]:
    """Bytes and flops."""
    evaluate = Evaluator(table.hints)
    return evaluate(op.other), evaluate(op.flops)


def linear(columns: int = WIDTH, rows: int = WIDTH) -> nn.Linear:
    return nn.Linear(rows, columns, bias=False, device="meta", dtype=torch.bfloat16)


def test_a_chain_of_pointwise_operators_and_casts_is_one_kernel() -> None:
    def chain(x: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return scaled.to(torch.bfloat16)

    table = table_of(chain, meta(ROWS, WIDTH))
    (op,) = table.local_ops
    assert op.kind == "fused" and op.after == ""
    assert values(table, op) == (2 * ACTIVATION, 0), "read once, written once, never in fp32"


def test_products_divide_what_is_fused_and_a_residual_is_read_by_the_later_kernel() -> None:
    first, second = linear(), linear()

    def block(x: Tensor) -> Tensor:
        hidden = first(functional.silu(x))
        return functional.silu(second(functional.relu(hidden).cos()) + x)

    table = table_of(block, meta(ROWS, WIDTH))
    fused = table.local_ops
    assert [op.kind for op in fused] == ["fused"] * 3
    assert [op.after for op in fused] == ["", table.ops[0].node, table.ops[1].node]
    one_in_one_out = 2 * ACTIVATION
    assert [values(table, op)[0] for op in fused] == [one_in_one_out] * 3, (
        "the residual sum is part of the second product"
    )


def test_uses_come_in_the_order_of_the_graph_and_local_ones_name_no_tensor() -> None:
    first, second = linear(), linear()
    table = table_of(lambda x: second(first(x.sin()).cos()).tan(), meta(ROWS, WIDTH))
    names = dict.fromkeys(table.operands(), "w")
    uses = table.uses(names, graph="g", calls=2.0)
    kinds = ["fused", "linear", "fused", "linear", "fused"]
    assert [use.kind for use in uses] == kinds
    assert [use.tensor for use in uses] == ["", "w", "", "w", ""]
    assert all(use.touched_bytes == 0 for use in uses if not use.tensor)
    assert {use.calls for use in uses} == {2.0}


def test_an_operand_without_a_name_is_local_and_its_time_counts() -> None:
    table = table_of(linear(), meta(ROWS, WIDTH))
    (use,) = table.uses({}, graph="g", calls=1.0)
    assert use.tensor == "" and use.touched_bytes == 2 * WIDTH * WIDTH and use.n == WIDTH


@pytest.mark.parametrize("causal", [False, True])
def test_attention_over_computed_keys_is_a_kernel_of_its_own(causal: bool) -> None:
    heads, tokens, depth = 4, 16, 32

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = functional.scaled_dot_product_attention(
            query.sin(), key.sin(), value.sin(), is_causal=causal
        )
        return mixed.transpose(1, 2).reshape(1, tokens, heads * depth).cos()

    operand = meta(1, heads, tokens, depth)
    table = table_of(attend, operand, operand, operand)
    (attention,) = [op for op in table.local_ops if op.kind == "attention"]
    pairs = tokens * (tokens + 1) // 2 if causal else tokens * tokens
    one = heads * tokens * depth * 2
    assert values(table, attention) == (4 * one, 4 * heads * pairs * depth)
    last = table.local_ops[-1]
    assert values(table, last)[0] == 2 * one, "the heads lie beside each other: nothing is copied"


def test_a_product_of_two_activations_and_a_convolution_count_their_flops() -> None:
    table = table_of(lambda x, y: x.sin() @ y.sin(), meta(4, ROWS, WIDTH), meta(4, WIDTH, 16))
    (product,) = [op for op in table.local_ops if op.kind == "matmul"]
    assert values(table, product)[1] == 2 * 4 * ROWS * WIDTH * 16

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return functional.conv2d(x, weight, stride=2)

    table = table_of(convolve, meta(1, 3, 8, 8), meta(5, 3, 2, 2))
    (convolution,) = table.local_ops
    assert convolution.kind == "convolution"
    assert values(table, convolution)[1] == 2 * 5 * 4 * 4 * 3 * 2 * 2


def test_a_cache_update_moves_what_is_written_and_not_the_cache() -> None:
    tokens, new = 1024, 2

    def update(cache: Tensor, x: Tensor, index: Tensor) -> Tensor:
        cache.index_copy_(1, index, x.sin())
        return x.cos()

    cache, x = meta(4, tokens, WIDTH), meta(4, new, WIDTH)
    table = table_of(update, cache, x, torch.empty(new, dtype=torch.long, device="meta"))
    moved = sum(values(table, op)[0] for op in table.local_ops)
    one = 4 * new * WIDTH * 2
    assert moved == 4 * one + new * 8, "two kernels read x; one writes rows, one a result"


def test_what_is_made_of_nothing_and_views_cost_nothing() -> None:
    def make(x: Tensor) -> Tensor:
        steps = torch.arange(WIDTH, device=x.device, dtype=x.dtype)
        return (x.view(ROWS // 2, 2, WIDTH).transpose(0, 1) * steps).contiguous()

    table = table_of(make, meta(ROWS, WIDTH))
    (op,) = table.local_ops
    assert values(table, op)[0] == 2 * ACTIVATION


def test_sizes_stay_in_the_symbols_of_the_graph() -> None:
    found: list[OpTable] = []

    def record(graph, _):
        from dak_inductor.normalise import normalise
        from dak_inductor.op_table import build_op_table, with_local_ops

        normalised = normalise(graph)
        found.append(with_local_ops(normalised, build_op_table(normalised)))
        return graph.forward

    compiled = torch.compile(lambda x: x.sin().cos(), backend=record, dynamic=True)
    compiled(torch.empty(8, 64))
    (table,) = found
    (op,) = table.local_ops
    values = {source.symbol: 100 for source in table.symbols}
    (use,) = table.uses({}, graph="g", calls=1.0, values=values)
    assert use.other_bytes == 2 * 100 * 100 * 4 and op.dtype == "float32"


def test_an_operator_with_several_results_writes_those_that_are_used() -> None:
    table = table_of(lambda x: torch.topk(x.sin(), 4), meta(ROWS, WIDTH))
    (op,) = table.local_ops
    assert values(table, op)[0] == ACTIVATION + ROWS * 4 * (2 + 8)
