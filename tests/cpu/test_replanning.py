"""When plans are made again, what they are made of, and that moves pay."""

from __future__ import annotations

import functools
import gc
from dataclasses import replace

import pytest
import torch
from torch import nn

import dak_inductor as dak
from dak_inductor import hardware, placement, replanning
from dak_inductor.backend import compile_graph
from dak_inductor.lowering.ahead.memory import StepMemory
from dak_inductor.lowering.ahead.ring_room import Room
from dak_inductor.move_gain import gains_by_graph
from dak_inductor.offloaded import record_of
from dak_inductor.offloaded_model import OffloadedModel
from dak_inductor.options import BackendOptions
from dak_inductor.planner import make_plan
from dak_inductor.session import SESSION


@pytest.fixture(autouse=True)
def _fresh_session():
    SESSION.reset()
    yield
    SESSION.reset()


class Hot(nn.Module):
    """One weight is read eight times a call, the other once: which is remote matters."""

    def __init__(self) -> None:
        super().__init__()
        self.hot = nn.Linear(512, 512, bias=False)
        self.cold = nn.Linear(512, 512, bias=False)

    def forward(self, x):
        for _ in range(8):
            x = self.hot(x)
        return self.cold(x)


def compiled(model, dynamic=None):
    backend = functools.partial(
        compile_graph, settings=BackendOptions(), executor=lambda graph, _: graph.forward
    )
    return torch.compile(model, backend=backend, dynamic=dynamic)


def offload(model: nn.Module, ratio: float) -> tuple[nn.Module, OffloadedModel]:
    """The model and its record, which holds the model weakly."""
    dak.offload(model, offload_ratio=ratio, remote="simulated")
    record = record_of(model)
    assert record is not None
    return model, record


def remote_of(record: OffloadedModel, name: str) -> int:
    return record.weights[name].buffer.bytes_by_tier().remote


def test_the_graph_tells_which_weight_is_read_often_and_it_comes_home():
    model, record = offload(Hot(), 0.5)
    assert abs(remote_of(record, "hot.weight") - remote_of(record, "cold.weight")) < 2**20
    step = compiled(model)
    x = torch.randn(1, 512)
    with torch.no_grad():
        first = step(x)
        for _ in range(16):
            again = step(x)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert remote_of(record, "hot.weight") < 0.1 * remote_of(record, "cold.weight")
    total = record.bytes_by_tier()
    assert total.remote >= record.plan.asked_bytes


def test_plans_are_due_at_ever_longer_intervals_and_when_sizes_grow():
    model, _record = offload(Hot(), 0.5)
    step = compiled(model, dynamic=True)
    due = []
    original = replanning.replan

    def noting(*args, **kwargs):
        due.append(SESSION.bindings()[0].calls)
        return original(*args, **kwargs)

    replanning.replan = noting
    try:
        with torch.no_grad():
            for rows in [2] * 17 + [5, 3, 5]:
                step(torch.randn(rows, 512))
    finally:
        replanning.replan = original
    assert due == [1, 16, 18]


@pytest.fixture
def plans_made(monkeypatch) -> list[object]:
    """A plan for each time that one was made again."""
    made: list[object] = []

    def making(problem, profile):
        made.append(make_plan(problem, profile))
        return made[-1]

    monkeypatch.setattr(replanning, "make_plan", making)
    return made


def test_no_plan_is_made_where_nothing_changed_since_one_that_moved_nothing(plans_made):
    model, record = offload(Hot(), 0.5)
    step = compiled(model, dynamic=True)
    with torch.no_grad():
        for _ in range(17):  # due at calls 1 and 16
            step(torch.randn(2, 512))
    again = functools.partial(replanning.replan, record, SESSION.bindings())
    again()
    assert record.settled is not None
    before = len(plans_made)
    assert again() is None and len(plans_made) == before
    hot = record.weights["hot.weight"].buffer
    hot.move(0)
    assert again() is not None and record.settled is None, "bytes lay elsewhere"
    for _ in range(2):
        assert again() is None
    assert len(plans_made) == before + 2, "the first after a move, not the second"
    with torch.no_grad():
        step(torch.randn(5, 512))  # due since it grew
    assert len(plans_made) == before + 3


def test_a_plan_is_made_anew_for_other_budgets_and_shares_of_calls(plans_made):
    model = Hot()
    dak.offload(model, gpu_memory=1_700_000, remote="simulated")
    record = record_of(model)
    assert record is not None
    with torch.no_grad():
        compiled(model)(torch.randn(1, 512))
    again = functools.partial(replanning.replan, record)
    for _ in range(2):
        again(SESSION.bindings())
    before = len(plans_made)
    assert again(SESSION.bindings()) is None and len(plans_made) == before
    record.budget.total = 1_500_000
    again(SESSION.bindings())
    again(SESSION.bindings())
    assert len(plans_made) == before + 2, "the second finds that nothing is left to move"
    torch._dynamo.reset()
    with torch.no_grad():
        compiled(model)(torch.randn(300, 512))  # a graph of its own
    assert len(SESSION.bindings()) == 2
    again(SESSION.bindings())
    made = len(plans_made)
    again(SESSION.bindings())
    assert len(plans_made) == made
    SESSION.bindings()[0].calls += 1
    again(SESSION.bindings())
    assert len(plans_made) == made + 1


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_collected_while_a_plan_is_made(monkeypatch, enabled):
    _model, record = offload(Hot(), 0.5)
    seen = []

    def making(*of):
        seen.append(gc.isenabled())
        raise RuntimeError("no plan")

    monkeypatch.setattr(replanning, "make_plan", making)
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(RuntimeError, match="no plan"):
            replanning.replan(record, [])
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert seen == [False]


def test_a_plan_that_does_not_pay_moves_nothing(monkeypatch):
    model, _record = offload(Hot(), 0.5)
    moved = []
    monkeypatch.setattr(placement, "apply", lambda plan, model: moved.append(plan))
    monkeypatch.setattr(replanning, "gain_of", lambda *_: 0.0)
    with torch.no_grad():
        compiled(model)(torch.randn(1, 512))
    assert not moved


def test_moves_forced_by_the_budget_need_no_gain(monkeypatch):
    model = Hot()
    dak.offload(model, gpu_memory=1_700_000, remote="simulated")
    record = record_of(model)
    assert record is not None
    before = record.bytes_by_tier()
    record.budget.total = 1_000_000
    monkeypatch.setattr(replanning, "gain_of", lambda *_: 0.0)
    with torch.no_grad():
        compiled(model)(torch.randn(1, 512))
    assert before.local > 1_000_000
    assert record.physical_bytes().local <= 1_000_000


def misplaced_in_graphs():
    """A compiled model, its record, and the buffers of the weight read often, which is all remote,
    and of the other, which is not; Inductor's graphs copy ahead."""
    model, record = offload(Hot(), 0.5)
    run = compiled(model)
    with torch.no_grad():
        run(torch.randn(1, 512))
    hot, cold = (record.weights[f"{name}.weight"].buffer for name in ("hot", "cold"))
    hot.move(0)
    cold.move(cold.nbytes)
    (binding,) = SESSION.bindings()
    binding.ahead = StepMemory("graph0", "auto", lambda: Room(0))
    binding.ahead.in_graphs = True
    return run, record, hot, cold, binding


@pytest.mark.parametrize("in_graphs", [False, True])
def test_what_inductor_captured_is_moved_by_need_alone(monkeypatch, in_graphs):
    """Its graphs copy the parts of their capture, and are captured once."""
    _run, record, hot, cold, binding = misplaced_in_graphs()
    binding.ahead.in_graphs = in_graphs
    moved = replanning.replan(record, [binding])
    assert (moved is None) is (hot.split == 0) is in_graphs
    wanted = hot.nbytes + cold.nbytes // 2
    monkeypatch.setattr(OffloadedModel, "required_remote_bytes", lambda _: wanted)
    assert replanning.replan(record, [binding]) is not None
    assert record.bytes_by_tier().remote >= wanted
    if in_graphs:
        assert hot.split == 0, "what is remote stays so, and no more moves than has to leave"


def test_graphs_that_are_gone_hold_no_bytes_where_they_are():
    run, record, hot, _cold, binding = misplaced_in_graphs()
    assert binding.is_compiled and replanning.replan(record, [binding]) is None
    torch._dynamo.reset()
    del run
    gc.collect()
    assert not binding.is_compiled
    assert replanning.replan(record, [binding]) is not None and hot.split > 0


def test_gain_is_the_difference_of_predicted_step_times():
    model, record = offload(Hot(), 0.5)
    with torch.no_grad():
        compiled(model)(torch.randn(1, 512))
    problem = replanning.problem_of(record, SESSION.bindings())
    profile = hardware.current(record.device)
    plan = make_plan(problem, profile)
    kept = tuple(
        replace(spec, min_remote=spec.current_remote, max_remote=spec.current_remote, page=None)
        for spec in problem.tensors
    )
    here = {spec.name: spec.current_remote for spec in problem.tensors}
    stay = make_plan(replace(problem, tensors=kept), profile)
    assert dict(stay.splits) == here
    assert replanning.gain_of(gains_by_graph(problem, stay, profile)) == pytest.approx(0, abs=1e-12)
    assert replanning.gain_of(gains_by_graph(problem, plan, profile)) == pytest.approx(
        stay.objective - plan.objective, abs=1e-9
    )


def test_blocks_not_seen_yet_weigh_as_much_as_those_seen():
    model, record = offload(nn.Sequential(Hot(), Hot()), 0.5)
    step = compiled(model[0])
    with torch.no_grad():
        step(torch.randn(1, 512))
    problem = replanning.problem_of(record, SESSION.bindings())
    calls = {use.tensor: use.calls for use in problem.uses}
    assert set(calls) == set(record.weights)
    assert len(set(calls.values())) == 1


def test_nothing_moves_for_models_that_were_restored():
    model, _record = offload(Hot(), 0.5)
    step = compiled(model)
    with torch.no_grad():
        step(torch.randn(1, 512))
        assert len(SESSION.bindings()) == 1
        dak.restore(model)
        assert not SESSION.bindings()
