"""Moves of live weights: bytes, order, budget in between, all or nothing."""

import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

from dak_inductor import hardware, placement
from dak_inductor.cuda_runtime.simulated import SimulatedTier
from dak_inductor.cuda_runtime.simulated_buffer import SimulatedBuffer
from dak_inductor.errors import MoveError, PlanError
from dak_inductor.offload import offload
from dak_inductor.offloaded import record_of
from dak_inductor.plan import PlanProblem
from dak_inductor.planner import make_plan

LAYER = 256 * 256 * 4


@pytest.fixture
def model():
    return nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4)))


def offloaded(model, **arguments):
    offload(model, remote="simulated", **arguments)
    return record_of(model)


def plan_for(record, remote):
    """A plan that makes `remote[name]` bytes remote."""
    problem = PlanProblem(
        tensors=tuple(
            replace(spec, min_remote=remote[spec.name], max_remote=remote[spec.name], page=None)
            for spec in record.specs()
        ),
        uses=(),
        remote_bytes=sum(remote.values()),
        remote="simulated",
        model=record.fingerprint,
    )
    return make_plan(problem, hardware.load("h200"))


def remotes(record):
    return {name: w.buffer.bytes_by_tier().remote for name, w in record.weights.items()}


def test_moves_are_what_the_plan_says_and_the_contents_stay(model):
    x = torch.randn(2, 256)
    expected = model(x)
    record = offloaded(model, offload_ratio=0.5)
    addresses = [layer.weight.data_ptr() for layer in model]
    wanted = dict(zip(record.weights, (0, LAYER, LAYER // 2, LAYER // 4), strict=True))
    before = remotes(record)
    report = placement.apply(plan_for(record, wanted), record)
    page = record.tier.page_bytes
    after = remotes(record)
    assert all(0 <= after[name] - wanted[name] < page for name in wanted)
    assert report.bytes_to_remote == sum(max(0, after[n] - before[n]) for n in wanted)
    assert report.bytes_to_local == sum(max(0, before[n] - after[n]) for n in wanted)
    assert report.tensors == sum(after[n] != before[n] for n in wanted) and report.seconds > 0
    assert [layer.weight.data_ptr() for layer in model] == addresses
    assert torch.equal(model(x), expected)


def test_the_budget_holds_in_between(model):
    budget = 2 * LAYER + 8192
    record = offloaded(model, gpu_memory=budget)
    names = list(record.weights)
    first = dict.fromkeys(names, 0) | {names[0]: LAYER, names[1]: LAYER}
    placement.apply(plan_for(record, first), record)
    second = dict.fromkeys(names, 0) | {names[2]: LAYER, names[3]: LAYER}
    placement.apply(plan_for(record, second), record)
    assert record.tier.counters.peak_local_bytes <= budget
    assert remotes(record)[names[2]] == LAYER and remotes(record)[names[0]] < 8192


def test_what_only_page_rounding_keeps_out_is_skipped_and_reported(model):
    record = offloaded(model, gpu_memory=2 * LAYER)
    names = list(record.weights)
    for shift in range(0, 4096, 512):
        half = LAYER // 2 + shift // 256 * 256
        wanted = dict(zip(names, (half, half, LAYER - half, LAYER - half), strict=True))
        report = placement.apply(plan_for(record, wanted), record)
        assert record.physical_bytes().local <= 2 * LAYER
        assert 0 <= report.skipped_bytes <= 4 * record.tier.page_bytes
    assert record.tier.counters.peak_local_bytes <= 2 * LAYER


def test_a_plan_over_the_budget_is_refused(model):
    record = offloaded(model, gpu_memory=2 * LAYER)
    before = remotes(record)
    with pytest.raises(MoveError, match="Raise gpu_memory"):
        placement.apply(plan_for(record, dict.fromkeys(record.weights, 0)), record)
    assert remotes(record) == before


@pytest.mark.parametrize("after", [0, 1, 70, 130, 200])
def test_a_failing_move_undoes_the_others(model, after):
    x = torch.randn(2, 256)
    expected = model(x)
    record = offloaded(model, offload_ratio=0.5, placement={"0": "cpu", "1": "cpu"})
    before = remotes(record)
    names = list(record.weights)
    wanted = dict.fromkeys(names, 0) | {names[2]: LAYER, names[3]: LAYER}
    record.tier.inject_failure("page", after=after)
    with pytest.raises(MoveError, match="the old placement stands"):
        placement.apply(plan_for(record, wanted), record)
    assert remotes(record) == before
    assert torch.equal(model(x), expected)
    placement.apply(plan_for(record, wanted), record)
    assert remotes(record) == wanted


def test_plans_of_other_models_are_refused(model):
    record = offloaded(model, offload_ratio=0.5)
    other = offloaded(nn.Sequential(nn.Linear(256, 256, bias=False)), offload_ratio=0.5)
    with pytest.raises(PlanError):
        placement.apply(plan_for(other, dict.fromkeys(other.weights, 0)), record)


def test_moves_wait_for_whoever_launches(model):
    record = offloaded(model, offload_ratio=0.5)
    plan = plan_for(record, dict.fromkeys(record.weights, LAYER))
    mover = threading.Thread(target=placement.apply, args=(plan, record))
    with placement.LAUNCH_LOCK:
        mover.start()
        mover.join(timeout=0.2)
        assert mover.is_alive() and record.bytes_by_tier().remote < 4 * LAYER
    mover.join()
    assert record.bytes_by_tier().remote == 4 * LAYER


def test_the_same_plan_again_moves_nothing(model):
    record = offloaded(model, offload_ratio=0.5)
    assert placement.apply(record.plan, record).tensors == 0


def test_what_others_hold_is_no_room_for_promotions():
    tier = SimulatedTier(page_bytes=4096)
    first, second = (tier.allocate(3 * 4096, split=0) for _ in range(2))
    moves = {first: 3 * 4096, second: 3 * 4096}
    report = placement._move_all(moves, room=4 * 4096, held=3 * 4096)
    assert (first.split, second.split) == (4096, 0)
    assert (report.bytes_to_local, report.skipped_bytes) == (4096, 5 * 4096)


def test_moves_that_fail_give_up_what_was_prepared_for_them(model, monkeypatch):
    record = offloaded(model, offload_ratio=0.25)
    given_up = []
    monkeypatch.setattr(SimulatedBuffer, "cancel_move", lambda self: given_up.append(self))
    record.tier.inject_failure("page", after=1)
    everything = dict.fromkeys(record.weights, LAYER)
    leaving = [w.buffer for n, w in record.weights.items() if remotes(record)[n] < LAYER]
    with pytest.raises(MoveError):
        placement.apply(plan_for(record, everything), record)
    assert len(leaving) >= 2 and {*map(id, leaving)} <= {*map(id, given_up)}


def test_nothing_moves_while_a_graph_is_captured(model, monkeypatch):
    record = offloaded(model, offload_ratio=0.5)
    plan, before = plan_for(record, dict.fromkeys(record.weights, LAYER)), remotes(record)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(record, "device", torch.device("cuda", 0))
    with pytest.raises(MoveError, match="captured"):
        placement.apply(plan, record)
    assert remotes(record) == before
