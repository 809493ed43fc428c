"""Compiled graphs whose steps are learned, planned and played, on the simulated tier.

The interpreter offers products to the step as operators on CUDA do.
"""

from __future__ import annotations

import copy
import functools
import logging

import pytest
import torch
from torch import nn

import dak_inductor as dak
from dak_inductor import ahead_room, copy_ring, hardware, replanning
from dak_inductor.ahead_room import ring_room
from dak_inductor.backend import compile_graph
from dak_inductor.cost_model import local_bandwidth, op_floor
from dak_inductor.lowering.ahead import memory, step_plan
from dak_inductor.lowering.ahead.known_step import KnownStep
from dak_inductor.lowering.ahead.sequence import CallSequence, StepCall, StoredWeight
from dak_inductor.lowering.ahead.step_costs import step_ops
from dak_inductor.lowering.ahead.step_op import StepOp
from dak_inductor.lowering.ahead.step_plan import StepPlan, StepPlans
from dak_inductor.lowering.host_cost import STAGED_SECONDS
from dak_inductor.lowering.linear.configuration import DECODE_TOKENS
from dak_inductor.lowering.ops_linear import LINEAR_OPERATORS
from dak_inductor.offloaded import record_of
from dak_inductor.options import BackendOptions
from dak_inductor.session import SESSION

WIDTH = 64


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch):
    SESSION.reset()
    dak.stats(reset=True)
    monkeypatch.setattr(ahead_room, "DEVICES", ("cpu",))
    monkeypatch.setattr(copy_ring, "LEAST_RING_BYTES", 256)
    yield
    SESSION.reset()


KERNELS = {operator.name.partition("(")[0]: operator.kernel for operator in LINEAR_OPERATORS}


class OnDevice(torch.fx.Interpreter):
    """Runs the dak:: products as their CUDA implementation does."""

    def call_function(self, target, args, kwargs):
        name = str(target).removeprefix("dak.").removesuffix(".default")
        kernel = KERNELS.get(name) if str(target).startswith("dak.") else None
        served = None if kernel is None else kernel(*args, **kwargs)
        return super().call_function(target, args, kwargs) if served is None else served


def compiled(model: nn.Module, *, dynamic: bool = False, **options):
    def executor(graph, _):
        return OnDevice(graph).run

    backend = functools.partial(
        compile_graph, settings=BackendOptions(**options), executor=executor
    )
    return torch.compile(model, backend=backend, dynamic=dynamic)


def offloaded(**request) -> tuple[nn.Module, nn.Module]:
    model = Net().to(torch.bfloat16)
    reference = copy.deepcopy(model)
    asked = request or {"offload_ratio": 0.9}  # some of each product
    return reference, dak.offload(model, remote="simulated", **asked)


def remote_per_call(model: nn.Module) -> int:
    record = record_of(model)
    assert record is not None
    return record.bytes_by_tier().remote


def staged_products(model: nn.Module) -> list[int]:
    return [step.staged for step in dak.explain(model).strategies]


@torch.no_grad()
@pytest.mark.parametrize(("strategy", "staged"), [("staged", [4]), ("direct", []), ("auto", [0])])
def test_outputs_bytes_and_what_explain_says(strategy: str, staged: list[int]) -> None:
    """So small weights are not worth a copy: auto leaves them direct, and says so."""
    reference, model = offloaded()
    run = compiled(model, strategy=strategy)
    for _ in range(4):
        x = torch.randn(3, WIDTH, dtype=torch.bfloat16)
        torch.testing.assert_close(run(x), reference(x), rtol=2e-2, atol=2e-2)
    assert dak.stats().total.remote == 4 * remote_per_call(model)
    assert staged_products(model) == staged
    text = str(dak.explain(model))
    assert ("products copied ahead" in text) == (strategy != "direct")
    for step in dak.explain(model).strategies:
        assert all(op.tensors[0].startswith("layers.") and op.reason for op in step.ops)


@torch.no_grad()
def test_what_lies_between_products_of_few_tokens_is_known_to_their_plan_for_cuda_graphs() -> None:
    """tanh and a sum ahead of all but the first; outside of CUDA graphs the host's time for them is
    not known."""
    _, model = offloaded()
    run = compiled(model, strategy="staged")
    for _ in range(3):
        run(torch.randn(3, WIDTH, dtype=torch.bfloat16))
    (binding,) = SESSION.bindings()
    assert binding.ahead is not None
    ((_, known),) = binding.ahead.steps()
    assert known.sequence is not None and known.plans is not None
    profile = hardware.load("h200")
    moved = 3 * (3 * WIDTH * 2)  # x and the product read, their sum written
    one = op_floor("fused", profile) + moved / local_bandwidth(profile)
    before = [call.before for call in known.sequence.calls]
    assert before == pytest.approx([0.0, one, one, one])
    captured, eager = known.plans.captured, known.plans.eager
    longer = captured.direct_seconds - sum(op.direct for op in ops_of(known))
    assert longer == pytest.approx(3 * one)
    assert eager.host_seconds == pytest.approx(4 * STAGED_SECONDS)


@torch.no_grad()
def test_plans_of_many_tokens_take_nothing_for_what_lies_between_products() -> None:
    _, model = offloaded()
    run = compiled(model, strategy="staged")
    for _ in range(3):
        run(torch.randn(DECODE_TOKENS + 1, WIDTH, dtype=torch.bfloat16))
    (binding,) = SESSION.bindings()
    assert binding.ahead is not None
    ((_, known),) = binding.ahead.steps()
    assert known.sequence is not None and known.plans is not None
    assert [call.before for call in known.sequence.calls] == [0.0] * 4


def test_a_weight_that_is_read_twice_has_the_work_ahead_of_each_in_turn() -> None:
    calls = [step_call(address) for address in (8, 16, 8, 24)]
    sequence = CallSequence(tuple(calls)).with_work({8: [1.0, 2.0], 16: [4.0], 32: [8.0]})
    assert [call.before for call in sequence.calls] == [1.0, 4.0, 2.0, 0.0]


def step_call(address: int) -> StepCall:
    weight = StoredWeight(address, 8, 16, None)
    return StepCall(address, None, (weight,), "")


def ops_of(known: KnownStep) -> tuple[StepOp, ...]:
    assert known.sequence is not None
    found = step_ops(known.sequence.calls, "simulated", 0)
    assert found is not None
    return found


@torch.no_grad()
def test_explain_shows_both_plans_where_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one where they do not, with what the host takes."""
    _, model = offloaded()
    run = compiled(model, strategy="staged")
    for _ in range(3):
        run(torch.randn(3, WIDTH, dtype=torch.bfloat16))
    (alike,) = dak.explain(model).strategies
    assert alike.where == "" and alike.staged == 4 and alike.waits_for_host
    assert alike.eager_seconds == pytest.approx(4 * STAGED_SECONDS)
    assert f"outside of CUDA graphs {4e6 * STAGED_SECONDS:.0f} us, which the host takes" in str(
        alike
    )

    (binding,) = SESSION.bindings()
    assert binding.ahead is not None
    ((_, known),) = binding.ahead.steps()
    assert known.plans is not None
    direct = StepPlan(
        (step_plan.OpStep("direct", "staged 1.600 ms of the host, direct 0.320 ms"),) * 4,
        (), (), 0, 32e-5, 32e-5, 32e-5, host_seconds=32e-5,
    )  # fmt: skip
    known.replace(StepPlans(known.plans.captured, direct), known.splits)
    found = dak.explain(model)
    captured, eager = found.strategies
    assert (captured.where, captured.staged) == ("in CUDA graphs", 4)
    assert (eager.where, eager.staged) == ("outside of CUDA graphs", 0)
    assert "host" not in str(captured)
    assert "predicted 320 us, all direct 320 us; the GPU waits for the host" in str(eager)
    for step in (captured, eager):
        assert str(step) in found.to_html() and step.where in str(found)
    known.inside = True
    assert dak.explain(model).strategies == (captured,), "Inductor captures it: calls are replays"


@torch.no_grad()
def test_a_line_in_the_log_for_each_plan(caplog: pytest.LogCaptureFixture) -> None:
    _, model = offloaded()
    run = compiled(model, strategy="staged")
    with caplog.at_level(logging.INFO, memory.__name__):
        for _ in range(4):
            run(torch.randn(3, WIDTH, dtype=torch.bfloat16))
    lines = [record.message for record in caplog.records if "predicted" in record.message]
    assert len(lines) == 1 and "4 of 4 products staged ahead" in lines[0]


@torch.no_grad()
def test_token_counts_of_one_dynamic_graph_keep_their_steps() -> None:
    reference, model = offloaded()
    run = compiled(model, strategy="staged", dynamic=True)
    for _ in range(3):
        for tokens in (5, 200):
            x = torch.randn(tokens, WIDTH, dtype=torch.bfloat16)
            torch.testing.assert_close(run(x), reference(x), rtol=2e-2, atol=2e-2)
    assert staged_products(model) == [4, 4]
    assert {step.tokens for step in dak.explain(model).strategies} == {"5 tokens", "200 tokens"}


@torch.no_grad()
def test_moves_between_calls_are_planned_anew() -> None:
    reference, model = offloaded()
    run = compiled(model, strategy="staged")
    record = record_of(model)
    assert record is not None
    x = torch.randn(3, WIDTH, dtype=torch.bfloat16)
    for split in (None, None, 0, 1 << 20, 4096):
        for weight in record.weights.values():
            if split is not None:
                weight.buffer.move(min(split, weight.buffer.nbytes))
        dak.stats(reset=True)
        held = remote_per_call(model)  # a plan that is due after the call moves them
        torch.testing.assert_close(run(x), reference(x), rtol=2e-2, atol=2e-2)
        assert dak.stats().total.remote == held


@torch.no_grad()
def test_a_weight_that_the_graph_writes_is_not_copied_ahead_of_it() -> None:
    class Training(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layers[0](x)
            self.layers[1].weight.view(-1).mul_(0.9)
            return self.layers[2](self.layers[1](x))

    model = Training().to(torch.bfloat16)
    reference = copy.deepcopy(model)
    dak.offload(model, offload_ratio=0.9, remote="simulated")
    run = compiled(model, strategy="staged")
    for _ in range(4):
        x = torch.randn(3, WIDTH, dtype=torch.bfloat16)
        torch.testing.assert_close(run(x), reference(x), rtol=2e-2, atol=1e-2)
    (step,) = dak.explain(model).strategies
    assert [op.strategy for op in step.ops] == ["staged", "direct", "staged"]
    assert "writes to its weight" in step.ops[1].reason


@torch.no_grad()
def test_the_first_ring_makes_a_plan_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak of memory that is measured then has it."""
    _, model = offloaded()
    run = compiled(model, strategy="staged")
    due: list[int] = []
    real = replanning.replan

    def replan(*args, **kwargs):
        due.append(SESSION.bindings()[0].calls)
        return real(*args, **kwargs)

    monkeypatch.setattr(replanning, "replan", replan)
    for _ in range(6):
        run(torch.randn(3, WIDTH, dtype=torch.bfloat16))
    assert due == [1, 2]


@torch.no_grad()
def test_two_models_on_a_device_and_one_restored() -> None:
    pairs = [offloaded() for _ in range(2)]
    runs = [compiled(model, strategy="staged") for _, model in pairs]
    x = torch.randn(3, WIDTH, dtype=torch.bfloat16)
    for _ in range(3):
        for (reference, _), run in zip(pairs, runs, strict=True):
            torch.testing.assert_close(run(x), reference(x), rtol=2e-2, atol=2e-2)
    dak.restore(pairs[0][1])
    torch.testing.assert_close(runs[1](x), pairs[1][0](x), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(runs[0](x), pairs[0][0](x), rtol=2e-2, atol=2e-2)
    assert staged_products(pairs[1][1]) == [4]


def test_the_room_is_what_the_budget_has(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100 * gib, 140 * gib))
    gpu = torch.device("cuda", 0)

    class Model:
        def __init__(self, limit: int, ratio: float | None = None) -> None:
            self.offload_ratio = ratio
            self.budget = type("Budget", (), {"limit": limit, "total": limit})()

    def room(*models: Model) -> tuple[int, bool]:
        found = ring_room(gpu, models)  # type: ignore[arg-type]
        return found.nbytes, found.charged

    assert room(Model(64 * gib)) == (gib, True)
    assert room(Model(40 * gib + (100 << 20))) == (100 << 20, True)
    assert room(Model(30 * gib)) == (0, True)
    assert room(Model(128 * gib, 0.5)) == (2 * gib, False)
    assert room() == (140 * gib // 64, False)
