"""The comparison of predicted with recorded times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dak_inductor.benchmarks import check_cost_model
from dak_inductor.benchmarks.check_cost_model import compare, compare_steps, rows, verdicts
from dak_inductor.benchmarks.harness.record import project_root
from dak_inductor.cost_model import HBM_SHARE, op_floor, op_time

RESULTS = project_root() / "benchmarks" / "results"
CEILINGS = {"hbm_stream": 4e12, "link_direct": 5e10, "link_copy": 5.5e10, "matmul_flops": 8e14}
FLOOR = op_floor("linear", check_cost_model.profile_of({"ceilings": CEILINGS}))


def linear(microseconds: float, *, share: float = 0.5, m: int = 1) -> dict[str, Any]:
    n = k = 4096
    return {
        "status": "ok", "shape": f"{n}x{k}", "N": n, "K": k, "M": m, "fraction": share,
        "realised": share, "weight_bytes": 2 * n * k, "microseconds": microseconds, "remote": "cpu",
    }  # fmt: skip


def test_a_cell_at_its_prediction_has_no_error() -> None:
    link_bound = 0.5 * 2 * 4096 * 4096 / 5e10 + FLOOR
    hbm_bound = (2 * 4096 * 4096 + 2 * 2 * 4096) / (HBM_SHARE * 4e12) + FLOOR
    cells = [linear(link_bound * 1e6), linear(hbm_bound * 1e6, share=0.0)]
    cells.append({**linear(1.0), "status": "failed"})
    found = compare("linear", {"ceilings": CEILINGS, "cells": cells})
    assert [each.error for each in found] == pytest.approx([0.0, 0.0], abs=1e-9)
    assert [each.remote for each in found] == ["more", "0"]
    assert all(verdict.passed for verdict in verdicts(found))


def test_a_cell_twice_as_slow_is_the_worst() -> None:
    right = (0.5 * 2 * 4096 * 4096 / 5e10 + FLOOR) * 1e6
    cells = [linear(right), linear(right), linear(2 * right)]
    found = compare("linear", {"ceilings": CEILINGS, "cells": cells})
    (row,) = rows(found)
    assert row["cells"] == 3 and row["median"] == pytest.approx(0.0, abs=1e-6)
    assert row["worst"] == pytest.approx(-50.0)
    median, worst = verdicts(found)
    assert median.passed and not worst.passed and worst.measured == pytest.approx(0.5)


def steps(**cells: float | None) -> dict[str, Any]:
    """A record of four layers; each cell of ours is at what is predicted of its products."""
    arguments = {"shape": "llama3-8b", "layers": 4, "batch": 1, "context": 512, "prefill": False}
    rows = [
        {"provider": "resident inductor", "status": "ok", "fraction": 0.0, "milliseconds": 1.0,
         "remote": "cpu"},
        {"provider": "split inductor", "status": "ok", "fraction": 0.1, "milliseconds": 9.0,
         "remote": "cpu", "products_milliseconds": 9.0},
        {"provider": "dak", "status": "failed", "fraction": 0.5, "remote": "cpu"},
    ]  # fmt: skip
    for name, products in cells.items():
        row = {"provider": "dak", "status": "ok", "fraction": 0.1, "remote": "cpu"}
        row["milliseconds"] = float(name.removeprefix("took_").replace("_", "."))
        rows.append(row if products is None else {**row, "products_milliseconds": products})
    return {"ceilings": CEILINGS, "arguments": arguments, "cells": rows}


def test_a_step_is_its_products_and_what_is_in_it_all_resident() -> None:
    record = steps()
    profile = check_cost_model.profile_of(record)
    uses = check_cost_model.step_uses(record["arguments"])
    assert len(uses) == 4 * 6, "gate and up are one product"
    assert sum(use.touched_bytes for use in uses) == 2 * 4 * 218_103_808
    products = 1e3 * sum(op_time(use, 0.0, profile, profile.link("cpu")) for use in uses)
    other = 1.0 - products
    found = compare_steps("decode_step", steps(took_3=3 - other, took_2_5=None, took_4=5 - other))
    assert [each.error for each in found] == pytest.approx([0.0, 0.25])
    assert {each.phase for each in found} == {"decode step"}
    assert [each.remote for each in found] == ["to 10%"] * 2


def test_a_record_without_predictions_or_resident_steps_tells_nothing_of_steps() -> None:
    assert compare_steps("decode_step", steps(took_3=None)) == []
    record = steps(took_3=2.0)
    record["cells"] = record["cells"][1:]
    assert compare_steps("decode_step", record) == []


def test_operators_and_steps_have_verdicts_of_their_own() -> None:
    right = (0.5 * 2 * 4096 * 4096 / 5e10 + FLOOR) * 1e6
    grid = compare("linear", {"ceilings": CEILINGS, "cells": [linear(right)]})
    names = [verdict.name for verdict in verdicts(grid)]
    assert names == ["median error", "worst error"]
    both = verdicts([*grid, *compare_steps("decode_step", steps(took_3=9.0))])
    assert [v.name for v in both] == [*names, "median error, steps", "worst error, steps"]
    assert both[0].passed and not both[2].passed


def test_all_recorded_grids_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_cost_model.main(["--out", str(tmp_path)])
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "cost_model.json").read_text())
    for name in check_cost_model.GRIDS:
        cells = [row["cells"] for row in record["cells"] if row["record"] == name]
        recorded = json.loads((RESULTS / f"{name}.json").read_text())["cells"]
        assert sum(cells) == sum(cell["status"] != "failed" for cell in recorded), name
        assert name in printed
    assert {row["phase"] for row in record["cells"]} == {"decode", "prefill", "prefill step"}


def test_another_record_is_refused() -> None:
    with pytest.raises(SystemExit, match="no grid"):
        check_cost_model.main([str(RESULTS / "load.json")])
