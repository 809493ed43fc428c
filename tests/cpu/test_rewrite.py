"""Normalising and rewriting: same values, dak:: ops where they belong, metadata kept, original
untouched."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dak_inductor as dak
from dak_inductor.cuda_runtime.simulated import SimulatedTier
from dak_inductor.lowering import counters
from dak_inductor.normalise import normalise
from dak_inductor.op_table import build_op_table
from dak_inductor.refusal import Refusal
from dak_inductor.rewrite import rewrite

from .test_random_programs import recording


class Recorder:
    """A backend that rewrites, keeps the graphs, and runs the rewritten one."""

    def __init__(self) -> None:
        self.originals = []
        self.normalised = []
        self.rewritten = []

    def __call__(self, graph_module, _):
        self.originals.append(graph_module)
        graph = normalise(graph_module)
        if isinstance(graph, Refusal):
            self.normalised.append(graph)
            return graph_module.forward
        self.normalised.append(graph)
        self.rewritten.append(rewrite(graph, build_op_table(graph)))
        return self.rewritten[-1].forward


def run(function, *args):
    recorder = Recorder()
    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(function, backend=recorder)(*args)
    return recorder, result


def targets(graph_module):
    return [str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"]


def tiered(values: torch.Tensor, label: str, *, page_bytes: int = 256):
    """The same values in a simulated buffer, half of it remote."""
    buffer = SimulatedTier(page_bytes=page_bytes).allocate(values.nbytes, split=values.nbytes // 2)
    buffer.label = label
    tensor = buffer.tensor(values.dtype, values.shape)
    tensor.copy_(values)
    return buffer, tensor


def every_op(x, weight, bias, experts, ids):
    y = F.linear(x, weight, bias)
    y = y + torch.addmm(bias, x, weight)
    y = y + x @ weight
    y = y + torch.bmm(x[None], weight[None])[0]
    y = y + F.embedding(ids, weight)
    y = y + experts[ids].sum((1, 2))[:, None]
    return y + weight.index_select(0, ids)


def test_every_op_is_rewritten_and_gives_the_same_bits_and_the_bytes_it_reads():
    plain = [torch.randn(16, 16), torch.randn(16), torch.randn(16, 16, 16)]
    x, ids = torch.randn(4, 16), torch.tensor([1, 12, 1, 0])
    expected = every_op(x, *plain, ids)
    held = [
        tiered(values, name)
        for values, name in zip(plain, ("weight", "bias", "experts"), strict=True)
    ]
    counters.reset()
    recorder, result = run(every_op, x, *[tensor for _, tensor in held], ids)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    (graph,) = recorder.rewritten
    assert sorted(name for name in targets(graph) if name.startswith("dak.")) == [
        "dak.addmm.default", "dak.embedding.default", "dak.gather.default", "dak.gather.default",
        "dak.linear.default", "dak.matmul.default", "dak.matmul.default",
    ]  # fmt: skip
    reads = {(read.kind, read.tensor): read.bytes for read in counters.snapshot()}
    half = 16 * 16 * 4 // 2
    assert (reads["linear", "weight"].local, reads["linear", "weight"].remote) == (half, half)
    assert reads["matmul", "weight"].total == 2 * 2 * half
    row = 16 * 4
    embedding = reads["embedding", "weight"]
    assert (embedding.local, embedding.remote) == (2 * row, row)  # rows 0 and 1 local, 12 remote
    experts = reads["gather", "experts"]
    assert (experts.local, experts.remote) == (2 * 16 * row, 16 * row)


@pytest.mark.parametrize("index", [torch.tensor(0), torch.tensor([0])])
@pytest.mark.parametrize("shape", [(), (16,), (16, 16)])
def test_an_index_or_a_table_without_dimensions_gives_torchs_shape(shape, index):
    _, table = tiered(torch.randn(shape), "table")
    _, result = run(lambda table, index: table.index_select(0, index), table, index)
    torch.testing.assert_close(result, table.index_select(0, index), rtol=0, atol=0)


def test_the_counted_tier_follows_a_move():
    buffer, weight = tiered(torch.randn(64, 64), "w", page_bytes=1024)
    x = torch.randn(2, 64)
    recorder = Recorder()
    torch._dynamo.reset()
    compiled = torch.compile(F.linear, backend=recorder)
    with torch.no_grad():
        first = compiled(x, weight)
        buffer.move(0)
        counters.reset()
        second = compiled(x, weight)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert counters.total().remote == weight.nbytes
    assert counters.total().local == 0
    assert len(recorder.originals) == 1, "a move must not recompile"


def test_metadata_survives_and_the_original_is_not_changed():
    layer = nn.Linear(8, 8).requires_grad_(False)
    recorder, _ = run(layer, torch.randn(2, 8))
    (original,), (graph,) = recorder.originals, recorder.rewritten
    assert not any(name.startswith("dak") for name in targets(original))
    old = [node for node in original.graph.nodes if node.op == "placeholder"]
    new = [node for node in graph.graph.nodes if node.op == "placeholder"]
    assert len(old) == len(new)
    for before, after in zip(old, new, strict=True):
        assert after._dynamo_source is before._dynamo_source
        assert "val" in after.meta
        assert "grapharg" not in after.meta
    assert graph.meta["dynamo_compile_id"] == original.meta["dynamo_compile_id"]
    assert graph._param_name_to_source is original._param_name_to_source
    (linear,) = [node for node in graph.graph.nodes if "linear" in str(node.target)]
    assert linear.meta["nn_module_stack"]


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_and_dropout_modes_survive_normalising(training):
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.0)).requires_grad_(False)
    net.train(training)
    x = torch.randn(16, 8)
    import copy

    expected = copy.deepcopy(net)(x)
    _, result = run(net, x)
    torch.testing.assert_close(result, expected)


def test_autocast_inside_the_graph_survives():
    layer = nn.Linear(8, 8).requires_grad_(False)

    def step(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    x = torch.randn(2, 8)
    expected = step(x)
    recorder, result = run(step, x)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert isinstance(recorder.normalised[0], torch.fx.GraphModule)


def test_data_dependent_sizes_are_refused_with_the_reason_and_still_run():
    weight = torch.randn(8, 8)

    def step(x):
        return x[x[:, 0] > 0] @ weight

    x = torch.randn(6, 8)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        recorder, result = run(step, x)
    torch.testing.assert_close(result, step(x))
    (refusal,) = recorder.normalised
    assert isinstance(refusal, Refusal)
    assert "depends on data" in refusal.reason


def test_checkpointed_regions_are_refused_and_still_run():
    from torch.utils.checkpoint import checkpoint

    weight = torch.randn(8, 8, requires_grad=True)

    def step(x):
        return checkpoint(lambda y: (y @ weight).relu(), x, use_reentrant=False)

    x = torch.randn(2, 8)
    recorder = Recorder()
    torch._dynamo.reset()
    result = torch.compile(step, backend=recorder)(x)
    torch.testing.assert_close(result, step(x))
    (refusal,) = recorder.normalised
    assert isinstance(refusal, Refusal)
    assert "higher-order" in refusal.reason


class Padded(nn.Module):
    """An embedding, and a product behind it."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(100, 64)
        self.product = nn.Linear(64, 64)

    def forward(self, ids):
        return self.product(self.table(ids)).relu()


def test_nested_tensors_are_refused_and_still_counted():
    torch._dynamo.reset()
    model = Padded().eval()
    lengths = (3, 5)
    ids = torch.nested.nested_tensor([torch.arange(n) for n in lengths], layout=torch.jagged)
    with torch.no_grad():
        expected = model(ids).values()
    dak.offload(model, offload_ratio=0.5, remote="simulated")
    made = []
    model.compile(backend=recording(made))
    dak.stats(reset=True)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(ids).values(), expected)
    assert dak.stats().total.remote > 0
    (refusal,) = made[0].table.refusals
    assert "nested tensor" in refusal.reason and "nested tensor" in str(dak.explain(model))
