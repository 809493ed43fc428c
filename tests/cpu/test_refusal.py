"""Reasons as users read them: where one ends can be seen."""

from __future__ import annotations

from dak_inductor.ahead_report import OpStrategy, StepStrategy
from dak_inductor.benchmarks.harness.peers.dak_backend import strategies_text
from dak_inductor.lowering.registry import TemplateRefusal
from dak_inductor.refusal import in_one_line
from dak_inductor.report.explanation_page import _kernels
from dak_inductor.report.style import STYLE
from dak_inductor.template_report import OpTemplate

FIRST = "keys and values are computed in the graph; there is no cache to tier"
SECOND = "no template for this operator; its stock kernel reads the tensor"


def test_several_in_one_line_are_numbered() -> None:
    assert in_one_line([]) == ""
    assert in_one_line([FIRST]) == FIRST
    assert in_one_line([FIRST, SECOND]) == f"(1) {FIRST} (2) {SECOND}"


def test_steps_of_a_benchmark_are_numbered_too() -> None:
    op = OpStrategy(("up",), "staged", "")
    off = StepStrategy("decode", "1 token", (), 0, 0.0, 0.0, off="its products vary; see above")
    staged = StepStrategy("decode", "1 token", (op,), 1 << 22, 1.0, 2.0)
    assert strategies_text([staged]) == "1 of 1 copied ahead"
    assert strategies_text([off, staged]) == (
        "(1) its products vary; see above (2) 1 of 1 copied ahead"
    )


def test_on_a_page_each_reason_has_a_line() -> None:
    passed = (TemplateRefusal("cuda", FIRST), TemplateRefusal("triton", SECOND))
    op = OpTemplate("decode", "a", "", "attention", "", "stock", passed)
    assert f"not cuda: {FIRST}\nnot triton: {SECOND}" in _kernels([op])
    assert "td.note{white-space:pre-line" in STYLE
