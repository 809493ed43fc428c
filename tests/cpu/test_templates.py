"""What serves each operator on CUDA, decided without a GPU: fusing, counting and reports follow."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import dak_inductor as dak
from dak_inductor import templates
from dak_inductor.binding import Binding
from dak_inductor.cuda_runtime.device_records import RecordCounters
from dak_inductor.cuda_runtime.simulated import SimulatedTier
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.epilogues import fuse_epilogues
from dak_inductor.lowering import counters, device_counters, op_facts
from dak_inductor.op_table import OpTable, build_op_table
from dak_inductor.rewrite import rewrite
from dak_inductor.session import SESSION
from dak_inductor.template_report import render, templates_of
from dak_inductor.templates import with_templates

K, N = 32, 48


@pytest.fixture
def hopper(monkeypatch):
    """A machine with an H200 and the compiled extension, whose GPU holds every tensor."""
    monkeypatch.setattr(templates, "on_cuda", lambda value: True)
    monkeypatch.setattr(op_facts, "visible_capability", lambda device: (9, 0))
    monkeypatch.setattr(op_facts, "extension_importable", lambda: True)
    monkeypatch.setattr(op_facts, "triton_importable", lambda: True)


@pytest.fixture(autouse=True)
def _fresh_session():
    SESSION.reset()
    counters.reset()
    yield
    SESSION.reset()
    counters.reset()


def on_cuda(function: Callable[..., Any], *shapes: tuple[int, ...], dtype=torch.bfloat16):
    """The graph and table that a call with CUDA tensors of these shapes would have."""
    with FakeTensorMode():
        arguments = [torch.empty(shape, dtype=dtype) for shape in shapes]
        graph = make_fx(function, pre_dispatch=True, tracing_mode="real")(*arguments)
    table = build_op_table(graph)
    rewritten = rewrite(graph, table)
    return rewritten, with_templates(rewritten, fuse_epilogues(rewritten, table))


def kinds(graph: GraphModule) -> list[str]:
    names = [str(node.target) for node in graph.graph.nodes]
    return [name.split(".")[1] for name in names if name.startswith("dak.")]


def gated(x, w, v):
    return F.silu(F.linear(x, w)) * F.linear(x, v)


def halves(x, w):
    gate, up = F.linear(x, w).chunk(2, -1)
    return F.silu(gate) * up


def test_what_the_cuda_template_takes_is_fused_and_counts_itself(hopper):
    for function, *shapes in ((gated, (N, K), (N, K)), (halves, (2 * N, K))):
        graph, table = on_cuda(function, (4, K), *shapes)
        assert kinds(graph) == ["gated_linear"]
        assert {op.template for op in table.ops} == {"cuda"}
        assert all(op.counts_itself and not op.passed_over for op in table.ops)


@pytest.mark.parametrize(
    ("shapes", "dtype", "reason"),
    [
        (((4, K), (N, K), (N, K)), torch.float32, "takes bfloat16 and float16"),
        (((4, 36), (N, 36), (N, 36)), torch.bfloat16, "multiples of 8"),
    ],
)
def test_what_it_does_not_take_is_not_fused_and_says_why(hopper, shapes, dtype, reason):
    graph, table = on_cuda(gated, *shapes, dtype=dtype)
    assert kinds(graph) == ["linear", "linear"]
    assert {op.template for op in table.ops} == {"triton"}
    for op in table.ops:
        (refusal,) = op.passed_over
        assert refusal.template == "cuda" and reason in refusal.reason


def test_halves_that_start_off_a_row_the_kernel_takes_stay_one_product(hopper):
    graph, _ = on_cuda(halves, (4, K), (2 * 12, K))
    assert kinds(graph) == ["linear"], "12 rows are no multiple of 8, 24 are"


def test_without_a_gpu_every_operator_is_stock_with_two_reasons(monkeypatch):
    monkeypatch.setattr(templates, "on_cuda", lambda value: True)
    monkeypatch.setattr(op_facts, "visible_capability", lambda device: None)
    graph, table = on_cuda(gated, (4, K), (N, K), (N, K))
    assert kinds(graph) == ["linear", "linear"]
    (row, _) = rows = templates_of("g", table)
    assert [r.template for r in rows] == ["stock", "stock"]
    assert row.reasons.count("there is no such GPU here") == 2
    assert row.reasons.startswith("not cuda: ")
    assert not any(op.counts_itself for op in table.ops)


def test_rows_stand_for_equal_layers(hopper):
    def layers(x, w, v):
        return F.linear(F.silu(F.linear(x, w)), v) + x

    _, table = on_cuda(layers, (4, K), (N, K), (K, N))
    rows = templates_of("g", table)
    assert [(row.kind, row.epilogue) for row in rows] == [
        ("linear_epilogue", "silu"),
        ("linear_epilogue", "residual"),
    ]
    assert render(rows * 3).row_count == 2


def binding_of(table: OpTable, *names: str) -> tuple[Binding, list[Any]]:
    """The table bound to weights, half of each remote, as if they lay on a GPU."""
    weights = range(1, 1 + len(names))
    buffers = []
    for index, name in zip(weights, names, strict=True):
        nbytes = max(4096, *(op.touched for op in table.ops if op.operand == index))
        buffer = SimulatedTier(page_bytes=256).allocate(nbytes, split=nbytes // 2)
        buffer.label = name
        buffers.append(buffer)
    binding = Binding(
        graph="g",
        table=table,
        names=dict(zip(weights, names, strict=True)),
        buffers={i: weakref.ref(b) for i, b in zip(weights, buffers, strict=True)},
        values={},
        simulated=False,
        seen_changes=0,
    )
    return binding, buffers


def test_an_operator_is_counted_by_its_kernel_or_by_the_table_never_by_both(hopper, monkeypatch):
    def product_and_table(x, w, rows):
        return F.linear(x, w) + F.embedding(x[:, 0].long(), rows).sum()

    _, table = on_cuda(product_and_table, (4, K), (N, K), (1000, K))
    assert {op.kind: op.counts_itself for op in table.ops} == {"linear": True, "embedding": False}
    binding, buffers = binding_of(table, "w", "rows")
    monkeypatch.setattr(SESSION, "bindings", lambda: [binding])
    kernel = RecordCounters(local_bytes=1000, remote_bytes=500, calls=3, peak_window=250_000)
    monkeypatch.setattr(device_counters, "read", lambda: [(buffers[0], kernel)])
    for _ in range(3):
        binding.note_call({})
    read = dak.stats()
    by_tensor = {count.tensor: count for count in read.reads}
    assert len(read.reads) == len(by_tensor) == 2
    assert by_tensor["w"] == counters.ReadCount(
        "linear", "w", 3, TierBytes(1000, 500), peak_window=250_000
    )
    assert by_tensor["rows"].kind == "embedding"
    assert by_tensor["rows"].calls == 3
    row = K * 2
    assert by_tensor["rows"].bytes == TierBytes(3 * 2 * row, 3 * 2 * row), "4 rows, half remote"
    assert read.peak_window == 250_000
    assert "peak window" in str(read)


def test_a_tensor_read_by_several_kinds_names_them_all(hopper, monkeypatch):
    def tied(x, w):
        return F.silu(F.linear(x, w)).sum() + F.linear(x, w)

    _, table = on_cuda(tied, (4, K), (N, K))
    binding, buffers = binding_of(table, "w")
    monkeypatch.setattr(SESSION, "bindings", lambda: [binding])
    monkeypatch.setattr(device_counters, "read", lambda: [(buffers[0], RecordCounters(8, 8, 2, 0))])
    (read,) = dak.stats().reads
    assert (read.kind, read.calls) == ("linear+linear_epilogue", 2)
    assert "peak window" not in str(dak.stats())


def test_a_reset_restarts_the_device_counters(monkeypatch):
    resets = []
    monkeypatch.setattr(device_counters, "reset", lambda: resets.append(1))
    dak.stats()
    assert not resets
    dak.stats(reset=True)
    assert resets == [1]
