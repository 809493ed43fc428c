"""Moves are judged by the steps that are known, as these would be planned after them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

import dak_inductor as dak
from dak_inductor import ahead_room, copy_ring, hardware, placement, replanning
from dak_inductor.binding import Binding
from dak_inductor.lowering.ahead import planning, step_costs
from dak_inductor.lowering.ahead.memory import StepMemory
from dak_inductor.move_gain import gain_by_steps, gain_of, gains_by_graph
from dak_inductor.offloaded import record_of
from dak_inductor.offloaded_model import OffloadedModel
from dak_inductor.planner import make_plan
from dak_inductor.session import SESSION

from .test_ahead_session import compiled
from .test_replanning import Hot


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch):
    SESSION.reset()
    monkeypatch.setattr(ahead_room, "DEVICES", ("cpu",))
    monkeypatch.setattr(copy_ring, "LEAST_RING_BYTES", 256)
    yield
    SESSION.reset()


@pytest.fixture
def hot() -> tuple[nn.Module, OffloadedModel, Binding]:
    """Its steps known, and the wrong weight remote: a plan brings the hot one home."""
    SESSION.automatic_moves = False
    model = dak.offload(
        Hot().to(torch.bfloat16).requires_grad_(False), offload_ratio=0.5, remote="simulated"
    )
    record = record_of(model)
    assert record is not None
    assert record.plan is not None
    nbytes = record.weights["hot.weight"].buffer.nbytes
    away = {"hot.weight": nbytes, "cold.weight": 0}
    placement.apply(replace(record.plan, splits=away), record)
    run = compiled(model)
    for _ in range(2):
        run(torch.randn(1, 512, dtype=torch.bfloat16))
    (binding,) = SESSION.bindings()
    return model, record, binding


def splits(record: OffloadedModel, share: float) -> dict[int, int]:
    return {
        id(w.buffer): w.buffer.nearest_split(round(share * w.buffer.nbytes))
        for w in record.weights.values()
    }


def test_a_step_is_predicted_at_its_splits_and_at_others(hot) -> None:
    _, record, binding = hot
    steps = binding.ahead
    (_, known), *_ = steps.steps()
    now = steps.predicted(lambda buffer: buffer.split, None)
    assert now == pytest.approx(known.plans.captured.seconds)
    local, remote = (splits(record, share) for share in (1.0, 0.0))
    assert steps.predicted(lambda b: local[id(b)], None) < now
    assert steps.predicted(lambda b: remote[id(b)], None) > now


def test_nothing_is_predicted_of_many_tokens_or_of_a_step_that_is_off(hot) -> None:
    model, _, binding = hot
    (_, known), *_ = binding.ahead.steps()
    known.off = "its products vary"
    assert binding.ahead.predicted(lambda buffer: buffer.split, None) is None
    SESSION.reset()
    SESSION.automatic_moves = False
    run = compiled(model)
    for _ in range(2):
        run(torch.randn(512, 512, dtype=torch.bfloat16))
    (binding,) = SESSION.bindings()
    assert binding.ahead.predicted(lambda buffer: buffer.split, None) is None


def test_nothing_is_predicted_where_the_profile_has_no_link_to_the_tier(
    hot, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, binding = hot
    offline = replace(hardware.load("h200"), links={})
    monkeypatch.setattr(step_costs, "profile_of", lambda _: offline)
    monkeypatch.setattr(planning, "profile_of", lambda _: offline)
    step_costs._few_tokens.cache_clear()
    assert binding.ahead.predicted(lambda buffer: buffer.split, None) is None


def test_where_no_step_is_known_the_gain_is_the_planners(hot) -> None:
    _, record, binding = hot
    problem = replanning.problem_of(record, [binding])
    profile = hardware.current(record.device)
    plan = make_plan(problem, profile)
    wanted = {id(t.buffer): t.buffer.nbytes - plan.splits[t.name] for t in record.tensors()}
    gains = gains_by_graph(problem, plan, profile)
    planners = gain_of(gains)
    assert planners > 0
    steps = gain_by_steps(gains, [binding], wanted)
    assert steps > 0 and steps != pytest.approx(planners)
    binding.ahead = None
    assert gain_by_steps(gains, [binding], wanted) == pytest.approx(planners)


@pytest.mark.parametrize(("longer", "moves"), [(-1.0, True), (0.0, False), (1.0, False)])
def test_a_placement_in_which_the_steps_are_slower_is_left_alone(
    hot, monkeypatch: pytest.MonkeyPatch, longer: float, moves: bool
) -> None:
    _, record, binding = hot
    here = {id(t.buffer): t.buffer.split for t in record.tensors()}

    def predicted(_: StepMemory, split_of: Callable, __: object) -> float:
        moved = any(split_of(t.buffer) != here[id(t.buffer)] for t in record.tensors())
        return 2.0 + longer * moved

    monkeypatch.setattr(StepMemory, "predicted", predicted)
    applied = []
    real = placement.apply
    monkeypatch.setattr(
        placement, "apply", lambda plan, model: applied.append(plan) or real(plan, model)
    )
    replanning.replan(record, [binding], measured=False)
    assert bool(applied) is moves
