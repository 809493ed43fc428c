"""`bench_replan` on a small chain: what it measures, and that it says what missed."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest

from dak_inductor import replanning
from dak_inductor.benchmarks import bench_replan
from dak_inductor.session import SESSION


@pytest.fixture(autouse=True)
def _fresh_session():
    SESSION.reset()
    yield
    SESSION.reset()


def test_plans_are_made_where_shares_of_calls_changed_and_not_where_nothing_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    make_plan = replanning.make_plan
    monkeypatch.setattr(replanning, "make_plan", lambda *of: made.append(0) or make_plan(*of))
    measure, planned = bench_replan.measure, []

    def measuring(*of):
        before = len(made)
        times = measure(*of)
        planned.append(len(made) - before)
        return times

    monkeypatch.setattr(bench_replan, "measure", measuring)
    monkeypatch.setattr(bench_replan, "BAR_MILLISECONDS", 1e9)
    sizes = ["--layers", "2", "--repeats", "4"]
    assert bench_replan.main([*sizes, "--out", str(tmp_path)]) == 0
    assert planned == [0, 0, 4]
    record = json.loads((tmp_path / "replan.json").read_text())
    assert [(cell["graphs"], cell["tensors"]) for cell in record["cells"]] == [
        (1, 14), (2, 14), (2, 14),
    ]  # fmt: skip
    assert all(0 < c["median_milliseconds"] <= c["worst_milliseconds"] for c in record["cells"])
    monkeypatch.setattr(bench_replan, "BAR_MILLISECONDS", 0.0)
    assert bench_replan.main([*sizes, "--out", str(tmp_path)]) == 1


def test_a_plan_that_moves_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replanning, "replan", lambda *_: object())
    model = Mock(settled=object())
    with pytest.raises(RuntimeError, match="moved bytes"):
        bench_replan.measure(model, [], 1, lambda: None)
    assert not bench_replan.settled(model, [])
