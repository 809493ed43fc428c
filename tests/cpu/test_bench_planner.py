"""`bench_planner` whole, on few problems: its record and its bars."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dak_inductor.benchmarks import bench_planner

PROBLEMS = {
    "random sizes": {0, 4 << 20, 64 << 20},
    "random sizes, placed": {64 << 20},
    "decoder": {4 << 20, 64 << 20},
}

pytest.importorskip("scipy", reason="the linear program needs scipy")


def test_planner_is_held_against_the_linear_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--uses", "42", "--repeats", "1", "--instances", "6"]
    status = bench_planner.main([*asked, "--out", str(tmp_path / "planner.json")])
    record = json.loads((tmp_path / "planner.json").read_text())
    assert record == json.loads(capsys.readouterr().out)
    bars = record["bars"]
    assert status == (0 if all(bars.values()) else 1)
    assert bars["optimum_before_rounding"] and bars["within_a_page_per_moved_tensor"]
    assert 0 < record["gaps"]["compared"] <= record["gaps"]["instances"] == 6
    rows = record["planning"]["rows"]
    assert {row["ratio"] for row in rows} == {0.02, 0.3, 0.9}
    rings = {name: {r["ring_bytes"] for r in rows if r["problem"] == name} for name in PROBLEMS}
    assert rings == PROBLEMS
    assert record["planning"]["worst_best_ms"] == max(row["best_ms"] for row in rows)
    optimum = bench_planner.linear_program
    monkeypatch.setattr(bench_planner, "linear_program", lambda *of: 1.01 * optimum(*of))
    assert bench_planner.main(asked) == 1, "a bar that is missed is an exit status"
    assert not json.loads(capsys.readouterr().out)["bars"]["optimum_before_rounding"]
