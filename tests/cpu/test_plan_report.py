"""The report of a plan: every operator and byte appears, at any width."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from dak_inductor.hardware import load
from dak_inductor.op_notes import OpNotes
from dak_inductor.plan import OpUse, Plan, PlanProblem, TensorSpec
from dak_inductor.plan_report import group_ops, render
from dak_inductor.planner import make_plan
from dak_inductor.quantity_text import bytes_text, seconds_text
from dak_inductor.refusal import Refusal

LAYERS = 4


def example() -> Plan:
    tensors = [TensorSpec(f"model.layers.{i}.up.weight", 1 << 26) for i in range(LAYERS)]
    uses = [
        OpUse(f"linear_{i}", graph, spec.name, "linear", spec.nbytes, 0.0, spec.nbytes * rows, 1.0,
              module=f"model.layers.{i}.up", source=f"/lib/[model].py:{i}", m=rows)
        for i, spec in enumerate(tensors)
        for graph, rows in (("prefill", 8192), ("decode", 8))
    ]  # fmt: skip
    refusals = tuple(
        Refusal(f"conv_{i}", "aten.convolution", "no [bold]template", f"model.layers.{i}.conv")
        for i in range(LAYERS)
    )
    problem = PlanProblem(tuple(tensors), tuple(uses), 3 << 25, "cpu", refusals, "Toy-1")
    return make_plan(problem, load("h200"))


PLAN = example()


def to_text(plan: Plan, *, width: int = 150, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    console.print(render(plan, **options))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def test_equal_layers_are_one_row_with_their_sums() -> None:
    (group,) = group_ops(op for op in PLAN.ops if op.graph == "decode")
    assert (group.label, group.count, group.m) == ("model.layers.*.up", LAYERS, 8)
    assert group.remote_bytes == pytest.approx(PLAN.remote_bytes)
    assert group.local_bytes == pytest.approx(PLAN.total_bytes - PLAN.remote_bytes)
    assert group.time == pytest.approx(PLAN.step_times["decode"])
    assert group.lowest_share < 0.02 and group.highest_share > 0.5


def test_all_ops_gives_every_operator_a_row_with_its_source() -> None:
    text = to_text(PLAN, all_ops=True)
    for layer in range(LAYERS):
        assert text.count(f"model.layers.{layer}.up ") == 2
        assert f"[model].py:{layer}" in text


@pytest.mark.parametrize("width", [80, 120, 200])
def test_nothing_essential_is_lost_at_any_width(width: int) -> None:
    text = to_text(PLAN, width=width)
    assert max(map(len, text.splitlines())) <= width
    for wanted in ("prefill", "decode", "link", "bound by", "compute", "TTFT", "TPOT", "Toy-1"):
        assert wanted in text
    assert seconds_text(PLAN.step_times["decode"]) in text
    assert bytes_text(PLAN.remote_bytes) in text


def test_refusals_are_grouped_with_their_reason_and_no_markup_is_read() -> None:
    text = to_text(PLAN)
    assert "not offloaded: 4 operators" in text
    assert "model.layers.*.conv" in text and "no [bold]template" in text


@pytest.mark.parametrize(
    ("width", "shown"),
    [(80, {"staged"}), (110, {"staged", "triton", "9.5 us"}),
     (172, {"staged", "triton", "9.5 us", "HBM", "kind", "[model].py:0"})],
)  # fmt: skip
def test_what_is_known_of_operators_stands_where_there_is_room(width: int, shown: set[str]) -> None:
    keys = [(op.graph, op.op) for op in PLAN.ops]
    notes = OpNotes(
        dict.fromkeys(keys, 2.375e-6), dict.fromkeys(keys, "staged"), dict.fromkeys(keys, "triton")
    )
    text = to_text(PLAN, width=width, notes=notes)
    assert max(map(len, text.splitlines())) <= width
    everything = {"staged", "triton", "9.5 us", "kind", "[model].py:0"}
    assert {word for word in everything if word in text} == shown & everything
    assert "strategy" in text and "bound by" in text and "model.layers" in text


def test_a_title_replaces_the_first_line() -> None:
    assert to_text(PLAN, title="my title").splitlines()[0] == "my title"
    assert render(PLAN) is not None
