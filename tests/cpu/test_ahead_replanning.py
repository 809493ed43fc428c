"""A model placed for copies ahead stays so once its graph is known, and not where none are made."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

import dak_inductor as dak
from dak_inductor import ahead_room, hardware, replanning
from dak_inductor.backend import compile_graph
from dak_inductor.budget import DeviceBudget
from dak_inductor.lowering.ahead.known_step import KnownStep
from dak_inductor.lowering.ahead.memory import StepMemory
from dak_inductor.lowering.ahead.ring_room import Room
from dak_inductor.make_room import give_way
from dak_inductor.offloaded import record_of
from dak_inductor.offloaded_model import OffloadedModel
from dak_inductor.options import BackendOptions
from dak_inductor.session import SESSION

WIDTH, WIDE, LAYERS = 256, 1024, 4
SLOW = 1e-4  # of the H200's rates: so small weights take as long as large ones there


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.o = nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, WIDE, bias=False)
        self.up = nn.Linear(WIDTH, WIDE, bias=False)
        self.down = nn.Linear(WIDE, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.o(x)
        return x + self.down(functional.silu(self.gate(x)) * self.up(x))


@pytest.fixture(autouse=True)
def _slow_hardware(monkeypatch: pytest.MonkeyPatch):
    fast = hardware.load("h200")
    slow = replace(
        fast,
        hbm_bandwidth=fast.hbm_bandwidth * SLOW,
        matmul_flops={name: rate * SLOW for name, rate in fast.matmul_flops.items()},
        links={
            name: replace(
                link,
                direct_bandwidth=link.direct_bandwidth * SLOW,
                copy_bandwidth=link.copy_bandwidth * SLOW,
            )
            for name, link in fast.links.items()
        },
    )
    monkeypatch.setattr(hardware, "current", lambda device: slow)
    monkeypatch.setattr(ahead_room, "DEVICES", ("cpu",))
    SESSION.reset()
    yield
    SESSION.reset()


def offloaded() -> tuple[nn.Module, OffloadedModel]:
    model = nn.Sequential(*(Block() for _ in range(LAYERS))).to(torch.bfloat16)
    model = dak.offload(model.requires_grad_(False), offload_ratio=0.25, remote="simulated")
    record = record_of(model)
    assert record is not None
    return model, record


def called(model: nn.Module, strategy: str) -> None:
    settings = BackendOptions(strategy=strategy)  # type: ignore[arg-type]
    backend = functools.partial(
        compile_graph, settings=settings, executor=lambda graph, _: graph.forward
    )
    run = torch.compile(model, backend=backend, dynamic=False)
    for _ in range(2):
        run(torch.randn(1, WIDTH, dtype=torch.bfloat16))


def remote(record: OffloadedModel) -> dict[str, int]:
    return {w.name: w.buffer.nbytes - w.buffer.split for w in record.weights.values()}


@torch.no_grad()
def test_fused_products_keep_the_placement_made_for_copies_ahead() -> None:
    model, record = offloaded()
    before = remote(record)
    assert {name for name, nbytes in before.items() if nbytes} == {
        f"{layer}.down.weight" for layer in range(LAYERS)
    }
    called(model, "auto")
    assert remote(record) == before
    assert record.plan is not None
    kinds = {op.kind for op in record.plan.ops if op.strategy == "staged"}
    assert kinds == {"linear_epilogue"}  # with the residual: the graph was planned, not the guess


def test_the_environment_says_for_which_strategy_a_model_is_placed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DAK_STRATEGY", "direct")
    _, record = offloaded()
    assert record.plan is not None
    assert not any(op.strategy == "staged" for op in record.plan.ops)
    assert any(name.endswith("gate.weight") for name, nbytes in remote(record).items() if nbytes)


@pytest.mark.parametrize(("strategy", "ahead"), [("auto", True), ("direct", False)])
def test_plans_before_the_first_graph_follow_the_environment(
    monkeypatch: pytest.MonkeyPatch, strategy: str, ahead: bool
) -> None:
    """Also the plan by which a model gives way to another one."""
    monkeypatch.setenv("DAK_STRATEGY", strategy)
    _, record = offloaded()
    assert bool(replanning.ring_bytes(record, [])) is ahead
    give_way(record, 1)
    assert record.plan is not None
    assert any(op.strategy == "staged" for op in record.plan.ops) is ahead


@torch.no_grad()
@pytest.mark.parametrize(("strategy", "ahead"), [("auto", True), ("direct", False)])
def test_a_graphs_option_wins_over_the_environment(
    monkeypatch: pytest.MonkeyPatch, strategy: str, ahead: bool
) -> None:
    model, record = offloaded()
    called(model, strategy)
    monkeypatch.setenv("DAK_STRATEGY", "direct" if ahead else "auto")
    assert bool(replanning.ring_bytes(record, SESSION.bindings())) is ahead


@torch.no_grad()
def test_direct_reads_have_a_placement_of_their_own() -> None:
    model, record = offloaded()
    before = remote(record)
    called(model, "auto")
    binding = SESSION.bindings()[-1]
    binding.ahead = StepMemory("graph", "direct", lambda: Room(0))
    assert replanning.ring_bytes(record, [binding]) == 0
    problem = replanning.problem_of(record, [binding])
    assert problem.ring_bytes == 0
    plan = replanning.make_plan(problem, hardware.current(record.device))
    assert not any(op.strategy == "staged" for op in plan.ops)
    assert dict(plan.splits) != before


def test_steps_that_are_all_off_count_as_never() -> None:
    steps = StepMemory("graph", "auto", lambda: Room(0))
    assert not steps.never
    steps._steps[1] = KnownStep(off="its products are captured by the compiler")
    assert steps.never
    steps._steps[2] = KnownStep()
    assert not steps.never


@pytest.mark.parametrize(("found", "helps"), [((9, 0), True), ((8, 0), False), ((12, 0), False)])
def test_only_a_hopper_card_counts_on_copies_ahead(
    found: tuple[int, int], helps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other GPU has products that rows could be copied for: placements must not await them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ahead_room, "capability", lambda index: found)
    monkeypatch.setattr(ahead_room, "_is_served", ahead_room._is_served.__wrapped__)
    card = torch.device("cuda", 0)
    assert ahead_room.copies_help(card) == helps
    assert (ahead_room.expected_ring(DeviceBudget(card, 1 << 34)) > 0) == helps
