"""`dak.explain(model).to_html()` beside the text: copies ahead, measured times, reasons, memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import dak_inductor as dak
from dak_inductor.ahead_report import OpStrategy, StepStrategy
from dak_inductor.explain import Explanation
from dak_inductor.lowering.linear.call_facts import CallFacts
from dak_inductor.lowering.linear.problem import LinearProblem
from dak_inductor.lowering.linear.trials import Trial
from dak_inductor.measured_ops import measured_seconds
from dak_inductor.plan import OpPlan, Plan
from dak_inductor.refusal import Refusal
from dak_inductor.report.window_history import WindowUpdate
from dak_inductor.template_report import OpTemplate

SHAPES = {"up": (512, 256), "gate": (512, 256), "down": (256, 512)}
SIZES = {name: n * k * 2 for name, (n, k) in SHAPES.items()}
STEP = StepStrategy(
    "graph1", "1 token",
    (*(OpStrategy((f"layers.{i}.up.weight",), "staged", "its remote rows are copied ahead")
       for i in range(3)),
     OpStrategy(("head.weight",), "direct", "few <bytes> of it are remote")),
    1 << 22, 2e-3, 3e-3,
)  # fmt: skip


def op(name: str, tensor: str, kind: str, m: int = 1, graph: str = "decode") -> OpPlan:
    return OpPlan(name, graph, tensor, kind, "direct", 0.5, 1e5, 1e5, 3e-5, 1.0, m=m,
                  module=f"layers.0.{name}")  # fmt: skip


def plan_of(*ops: OpPlan) -> Plan:
    half = {name: size // 2 for name, size in SIZES.items()}
    graphs = dict.fromkeys((each.graph for each in ops), 1e-3)
    return Plan("Toy-1", "h200", "cpu", sum(half.values()), half, SIZES, ops, (), graphs, graphs,
                1.0, 1.0)  # fmt: skip


def trial(
    n: int, k: int, *, m: int = 1, gated: bool = False, activation: str = "none", share: float = 0.5
) -> Trial:
    problem = LinearProblem(m, n, k, torch.bfloat16, gated)
    call = CallFacts(problem, (round(share * problem.weight_bytes),), "cpu", 0, activation)
    return Trial(call, (("direct", 41e-6), ("stock", 37e-6)), "stock")


def explained() -> Explanation:
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.Linear(512, 256))
    dak.offload(model, offload_ratio=0.5, remote="simulated")
    return dak.explain(model)


def test_a_product_has_the_time_of_its_kind() -> None:
    plan = plan_of(op("a", "up", "linear"), op("b", "down", "linear"),
                   op("c", "up", "gated_linear"), op("c", "gate", "gated_linear"))  # fmt: skip
    gated = trial(512, 256, gated=True, activation="silu")
    assert measured_seconds(plan, [trial(512, 256)], SHAPES) == {("decode", "a"): 37e-6}
    assert measured_seconds(plan, [gated], SHAPES) == {("decode", "c"): 37e-6}
    assert measured_seconds(plan, [], SHAPES) == {}


@pytest.mark.parametrize(
    "other",
    [
        trial(512, 256, m=300),
        trial(512, 256, share=0.1),
        trial(256, 512),
        trial(512, 256, activation="silu"),
        trial(512, 256, gated=True),
    ],
)
def test_other_kinds_are_not_taken_for_it(other: Trial) -> None:
    assert measured_seconds(plan_of(op("a", "up", "linear")), [other], SHAPES) == {}


def test_measured_times_stand_beside_the_predicted_ones() -> None:
    found = explained()
    assert "measured" not in found.to_html()
    plan = plan_of(op("a", "up", "linear"), op("b", "down", "linear"), op("b2", "down", "linear"))
    page = replace(found, plan=plan, measured={("decode", "a"): 37e-6}).to_html()
    assert page.count(">measured</th>") == 2, "equal layers, and all operators"
    assert page.count("<td>37 us<") == 2
    assert "of trials" in page


def test_a_sum_is_shown_only_where_each_of_its_products_was_measured() -> None:
    first = op("a", "up", "linear")
    layers = [first, replace(first, op="a1", module="layers.1.a")]
    some = replace(explained(), plan=plan_of(*layers), measured={("decode", "a"): 37e-6})
    all_ = replace(some, measured={("decode", "a"): 37e-6, ("decode", "a1"): 38e-6})
    assert "75 us" in all_.to_html() and "75 us" not in some.to_html()
    assert some.to_html().count("37 us") == 1


def test_each_operator_has_its_strategy_and_kernel_in_text_and_page() -> None:
    known = StepStrategy("decode", "1 token", (OpStrategy(("up",), "staged", ""),), 0, 1.0, 1.0)
    eager = replace(known, ops=(OpStrategy(("up",), "direct", ""),), where="outside of CUDA graphs")
    served = (OpTemplate("decode", "a", "", "linear", "", "triton", ()),)
    here = replace(op("d", "down", "linear"), remote_share=0.0)
    found = replace(
        explained(), strategies=(known, eager), templates=served, measured={("decode", "a"): 37e-6},
        plan=plan_of(op("a", "up", "linear"), op("b", "down", "linear"),
                     op("c", "up", "gated_linear"), op("c", "gate", "gated_linear"), here,
                     op("e", "down", "linear", graph="other")),
    )  # fmt: skip
    assert found.notes.kernels == {("decode", "a"): "triton"}
    assert found.notes.strategies == {
        ("decode", "a"): "staged", ("decode", "b"): "direct", ("decode", "c"): "staged",
        ("other", "e"): "direct",
    }  # fmt: skip
    rows = [line.split() for line in str(found).splitlines() if " layers.*.a " in line]
    assert rows[0][-2:] == ["staged", "triton"] and "37 us" in " ".join(rows[0])
    page = found.to_html()
    assert "<td>staged<td>triton" in page and ">strategy</th>" in page and ">kernel</th>" in page


def test_the_text_may_have_a_row_for_every_operator() -> None:
    layers = [replace(op(f"a{i}", "up", "linear"), module=f"layers.{i}.a", source=f"m.py:{i}")
              for i in range(3)]  # fmt: skip
    found = replace(explained(), plan=plan_of(*layers))
    assert "layers.*.a" in str(found) and "layers.1.a" not in str(found)
    text = found.to_text(all_ops=True, width=120)
    assert all(f"layers.{i}.a" in text and f"m.py:{i}" in text for i in range(3))


def test_copies_ahead_are_on_the_page_as_in_the_text() -> None:
    found = replace(explained(), strategies=(STEP, replace(STEP, ops=(), off="products vary")))
    page, text = found.to_html(), str(found)
    for step in found.strategies:
        assert str(step) in text and str(step) in page
    assert "3 of 4 products copied ahead" in page and "layers.*.up.weight" in page
    assert "few &lt;bytes&gt; of it are remote" in page and "Copied ahead" in page
    assert "Copied ahead" not in explained().to_html()


def test_reasons_and_what_memory_would_buy_are_on_the_page() -> None:
    found = explained()
    refused = Refusal("conv", "aten.convolution", "no template", "model.conv")
    page = replace(found, plan=replace(found.plan, refusals=(refused,))).to_html()
    assert "no template" in page and "model.conv" in page
    assert "What more GPU memory would buy" in page and "as it is" in page


def test_the_history_of_the_window_is_on_the_page() -> None:
    updates = tuple(WindowUpdate(i * 1e6, 2e5 + 1e4 * i, 3e3) for i in range(5))
    page = replace(explained(), window_history=updates).to_html()
    assert "5 updates: from 200.0 kB to 240.0 kB" in page and page.count('class="chart"') == 2
