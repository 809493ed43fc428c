"""The backend end to end on the simulated tier: outputs, bytes by tier, warnings, compiles."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch import nn

import dak_inductor as dak
from dak_inductor.backend import compile_graph
from dak_inductor.errors import (
    ModelError,
    NothingOffloadedError,
    OptionError,
    PlanError,
    ResidentCopyError,
)
from dak_inductor.offloaded import record_of
from dak_inductor.options import BackendOptions
from dak_inductor.session import SESSION


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.nn.functional.silu(self.up(x)))


class Net(nn.Module):
    def __init__(self, width: int = 192, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(autouse=True)
def _fresh_session():
    SESSION.reset()
    dak.stats(reset=True)
    yield
    SESSION.reset()


def eager_executor(graph, _):
    return graph.forward


def backend(**options):
    """The backend's pipeline around a plain interpreter: as fast as tests need it."""
    return functools.partial(
        compile_graph, settings=BackendOptions(**options), executor=eager_executor
    )


def offloaded(ratio: float = 0.5, **sizes) -> tuple[nn.Module, nn.Module]:
    """A resident model and the same model offloaded to the simulated tier."""
    model = Net(**sizes)
    reference = copy.deepcopy(model)
    return reference, dak.offload(model, offload_ratio=ratio, remote="simulated")


def call(function, *args):
    with torch.no_grad():
        return function(*args)


def test_same_output_and_every_weight_byte_read_once_from_its_tier():
    reference, model = offloaded(0.5)
    x = torch.randn(4, 192)
    compiled = torch.compile(model, backend=backend())
    result = call(compiled, x)
    torch.testing.assert_close(result, call(reference, x), rtol=0, atol=0)
    record = record_of(model)
    assert record is not None
    held = record.bytes_by_tier()
    assert held.remote >= 0.5 * held.total - 1024
    read = dak.stats().total
    assert (read.local, read.remote) == (held.local, held.remote)
    call(compiled, x)
    assert dak.stats(reset=True).total.remote == 2 * held.remote
    assert dak.stats().total.total == 0


def test_moves_between_calls_change_neither_outputs_nor_graphs():
    _, model = offloaded(0.5)
    x = torch.randn(4, 192)
    compiled = torch.compile(model, backend=backend())
    first = call(compiled, x)
    record = record_of(model)
    assert record is not None
    for weight in record.weights.values():
        weight.buffer.move(0)
    dak.stats(reset=True)
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(call(compiled, x), first, rtol=0, atol=0)
    assert dak.stats().total.local == 0
    assert dak.stats().total.remote == record.bytes_by_tier().total
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_dynamic_rows_share_one_graph():
    reference, model = offloaded(0.3)
    compiled = torch.compile(model, backend=backend(), dynamic=True)
    for rows in (3, 7, 2):
        x = torch.randn(rows, 192)
        torch.testing.assert_close(call(compiled, x), call(reference, x), rtol=0, atol=0)
    (binding,) = SESSION.bindings()
    assert binding.calls == 3
    assert binding.rows == 2


def test_two_models_of_one_class_are_told_apart():
    _, first = offloaded(0.5)
    _, second = offloaded(1.0)
    x = torch.randn(2, 192)
    for model in (first, second):
        call(torch.compile(model, backend=backend()), x)
        record = record_of(model)
        assert record is not None
        read = dak.stats(reset=True).total
        assert (read.local, read.remote) == (
            record.bytes_by_tier().local,
            record.bytes_by_tier().remote,
        )


def test_equal_blocks_compiled_once_are_all_bound():
    reference, model = offloaded(0.5, blocks=4)
    compiles = []

    def counting(graph_module, inputs):
        compiles.append(graph_module)
        return backend()(graph_module, inputs)

    for block in model.blocks:
        block.compile(backend=counting)
    x = torch.randn(2, 192)
    torch.testing.assert_close(call(model, x), call(reference, x), rtol=0, atol=0)
    record = record_of(model)
    assert record is not None
    assert dak.stats().total.remote == record.bytes_by_tier().remote
    assert len(SESSION.bindings()) == 4
    planned = {op.tensor for op in dak.explain(model).plan.ops}
    assert planned == set(record.weights)


def test_graph_breaks_bind_each_piece():
    reference, model = offloaded(0.5)

    class Broken(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            x = self.inner.blocks[0](x)
            torch._dynamo.graph_break()
            return self.inner.blocks[1](x)

    x = torch.randn(2, 192)
    result = call(torch.compile(Broken(model), backend=backend()), x)
    torch.testing.assert_close(result, call(reference, x), rtol=0, atol=0)
    record = record_of(model)
    assert record is not None
    assert dak.stats().total.remote == record.bytes_by_tier().remote


def test_inputs_that_require_grad_go_to_the_executor_untouched_with_a_warning():
    _, model = offloaded(0.5)
    seen = []

    def executor(graph, inputs):
        seen.append(graph)
        return graph.forward

    compiled = torch.compile(
        model,
        backend=functools.partial(compile_graph, settings=BackendOptions(), executor=executor),
    )
    x = torch.randn(2, 192, requires_grad=True)
    with pytest.warns(UserWarning, match="requires grad"):
        compiled(x).sum().backward()
    assert x.grad is not None
    assert not any("dak" in str(node.target) for node in seen[0].graph.nodes)


def test_nothing_offloaded_warns_once_and_raises_under_strict():
    model = Net().requires_grad_(False)
    x = torch.randn(2, 192)
    with pytest.warns(UserWarning, match=r"dak\.offload"):
        call(torch.compile(model, backend=backend()), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch._dynamo.reset()
        call(torch.compile(model, backend=backend()), x)
    torch._dynamo.reset()
    with pytest.raises(NothingOffloadedError):
        call(torch.compile(model, backend=backend(strict=True)), x)


@pytest.mark.parametrize("how", ["deepcopy", "assign", "dtype"])
def test_weights_that_became_resident_are_noticed(how):
    _, model = offloaded(0.5)
    dtype = torch.float32
    target = model
    if how == "deepcopy":
        target = copy.deepcopy(model)
    elif how == "assign":
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
    else:
        dtype = torch.float64
        model.to(dtype)
    x = torch.randn(2, 192, dtype=dtype)
    with pytest.warns(UserWarning, match="replaced by tensors"):
        result = call(torch.compile(target, backend=backend()), x)
    torch.testing.assert_close(result, call(target, x))
    torch._dynamo.reset()
    with pytest.raises(ResidentCopyError, match="weight"):
        call(torch.compile(target, backend=backend(strict=True)), x)


def test_what_was_replaced_in_one_model_is_no_other_models_affair():
    """Two models of one class: each is warned about once, and a sound one not at all."""
    reference, sound = offloaded(0.5)
    _, second = offloaded(0.5)
    _, third = offloaded(0.5)
    x = torch.randn(2, 192, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.double()
        third.double()
        result = call(torch.compile(sound, backend=backend(strict=True)), x.float())
    torch.testing.assert_close(result, call(reference, x.float()), rtol=0, atol=0)
    for model in (second, third):
        torch._dynamo.reset()
        with pytest.warns(UserWarning, match="replaced by tensors"):
            call(torch.compile(model, backend=backend()), x)
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(torch.compile(model, backend=backend()), x)


def test_a_model_beside_an_offloaded_one_is_no_silent_exception():
    _, model = offloaded(0.5)
    other = nn.Sequential(nn.Linear(64, 64), nn.ReLU()).requires_grad_(False)
    x = torch.randn(2, 64)
    with pytest.warns(UserWarning, match="nothing is offloaded"):
        call(torch.compile(other, backend=backend()), x)
    torch._dynamo.reset()
    with pytest.raises(NothingOffloadedError):
        call(torch.compile(other, backend=backend(strict=True)), x)
    assert record_of(model) is not None


def test_small_tensors_of_an_offloaded_model_may_stand_alone_in_a_graph():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.small, self.net = nn.Linear(192, 4), Net()

        def forward(self, x):
            y = self.small(x)
            torch._dynamo.graph_break()
            return self.net(x) * y.sum()

    model = Gate().requires_grad_(False)
    reference = copy.deepcopy(model)
    dak.offload(model, offload_ratio=0.5, remote="simulated")
    x = torch.randn(2, 192)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = call(torch.compile(model, backend=backend(strict=True)), x)
    torch.testing.assert_close(result, call(reference, x), rtol=0, atol=0)


def test_an_in_place_update_reaches_the_compiled_graph():
    reference, model = offloaded(0.5)
    compiled = torch.compile(model, backend=backend())
    x = torch.randn(2, 192)
    call(compiled, x)
    with torch.no_grad():
        for net in (reference, model):
            net.blocks[0].up.weight += 0.5
    torch.testing.assert_close(call(compiled, x), call(reference, x), rtol=0, atol=0)
    record = record_of(model)
    assert record is not None
    assert record.bytes_by_tier().remote > 0


def test_a_plan_of_the_users_is_applied_and_one_of_another_model_is_refused(tmp_path):
    reference, model = offloaded(0.25)
    x = torch.randn(2, 192)
    path = tmp_path / "plan.json"
    _, other = offloaded(0.75)
    path.write_text(dak.explain(other).plan.to_json())
    result = call(torch.compile(model, backend=backend(plan=str(path))), x)
    torch.testing.assert_close(result, call(reference, x), rtol=0, atol=0)
    record = record_of(model)
    assert record is not None
    held = record.bytes_by_tier()
    assert held.remote >= 0.7 * held.total
    _, small = offloaded(0.5, width=256)
    torch._dynamo.reset()
    with pytest.raises(PlanError, match="is a plan of model"):
        call(torch.compile(small, backend=backend(plan=str(path))), torch.randn(2, 256))
    with pytest.raises(PlanError, match=r"missing\.json"):
        torch._dynamo.reset()
        call(torch.compile(model, backend=backend(plan=str(tmp_path / "missing.json"))), x)


def test_explain_needs_an_offloaded_model_and_names_every_weight():
    with pytest.raises(ModelError, match=r"dak\.offload"):
        dak.explain(Net())
    _, model = offloaded(0.5)
    before = dak.explain(model)
    assert "no graph seen yet" in str(before)
    call(torch.compile(model, backend=backend()), torch.randn(2, 192))
    after = dak.explain(model)
    assert after.graphs == 1
    text = str(after)
    assert "blocks.*.up" in text
    record = record_of(model)
    assert record is not None
    assert after.plan.remote_bytes == record.bytes_by_tier().remote


def test_unknown_options_reach_the_user_through_torch_compile():
    import gc
    import weakref

    _, model = offloaded(0.5)
    alive = weakref.ref(model)
    compiled = torch.compile(model, backend="dak", options={"stritc": 1})
    for _ in range(2):
        with pytest.raises(OptionError, match="did you mean strict"):
            call(compiled, torch.randn(2, 192))
    del model, compiled
    torch._dynamo.reset()
    gc.collect()
    assert alive() is None, "the error keeps the model alive"


def test_the_registered_backend_compiles_through_inductor():
    reference, model = offloaded(0.5)
    x = torch.randn(4, 192)
    compiled = torch.compile(model, backend="dak", options={"mode": "reduce-overhead"})
    torch.testing.assert_close(call(compiled, x), call(reference, x), rtol=1e-5, atol=1e-5)
    record = record_of(model)
    assert record is not None
    read = dak.stats().total
    assert (read.local, read.remote) == (
        record.bytes_by_tier().local,
        record.bytes_by_tier().remote,
    )


def test_a_second_process_starts_from_the_cache_and_still_counts(tmp_path):
    script = textwrap.dedent(
        """
        import torch
        import dak_inductor as dak
        from torch._dynamo.utils import counters
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(192, 256), torch.nn.Linear(256, 192))
        x = torch.randn(2, 192)
        expected = model(x).detach()
        dak.offload(model, offload_ratio=0.5, remote="simulated")
        with torch.no_grad():
            result = torch.compile(model, backend="dak")(x)
        torch.testing.assert_close(result, expected)
        hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"][
            "autograd_cache_hit"]
        print("RESULT", int(hits > 0), dak.stats().total.remote)
        """
    )
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    lines = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        (line,) = [line for line in run.stdout.splitlines() if line.startswith("RESULT")]
        lines.append(line.split()[1:])
    (cold, cold_remote), (warm, warm_remote) = lines
    assert (cold, warm) == ("0", "1")
    assert int(cold_remote) > 0
    assert cold_remote == warm_remote


def test_compiled_code_keeps_no_weight_alive():
    import gc

    from dak_inductor.cuda_runtime import address_table

    gc.collect()
    before = len(address_table.live_buffers())
    _, model = offloaded(0.5)
    x = torch.randn(2, 192)
    call(torch.compile(model, backend=backend()), x)
    assert len(address_table.live_buffers()) > before
    del model
    torch._dynamo.reset()
    gc.collect()
    assert len(address_table.live_buffers()) == before
    assert not [binding for binding in SESSION.bindings() if binding.names]


def test_memory_of_a_model_that_went_is_not_taken_for_the_next_one():
    import gc

    x = torch.randn(2, 192)
    compiled = torch.compile(lambda net, y: net(y), backend=backend(), dynamic=False)
    for ratio in (0.25, 0.75):
        reference, model = offloaded(ratio)
        dak.stats(reset=True)
        torch.testing.assert_close(call(compiled, model, x), call(reference, x), rtol=0, atol=0)
        record = record_of(model)
        assert record is not None
        assert dak.stats().total.remote == record.bytes_by_tier().remote
        del model, record
        gc.collect()
