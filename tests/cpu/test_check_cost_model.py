"""The comparison of predicted with recorded times."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dak_inductor.benchmarks import check_cost_model
from dak_inductor.benchmarks.check_cost_model import (
    compare,
    compare_steps,
    newest_steps,
    rows,
    verdicts,
)
from dak_inductor.benchmarks.harness.record import project_root
from dak_inductor.benchmarks.harness.timing import REPLAYS
from dak_inductor.cost_model import HBM_SHARE, op_floor

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


def steps(*milliseconds: float, **changed: Any) -> dict[str, Any]:
    """A record of one layer, 1% of it remote, that was measured so."""
    arguments = {"shape": "tiny", "layers": 1, "batch": 1, "context": 16, "prefill": False}
    row = {"provider": "dak", "status": "ok", "fraction": 0.01, "remote": "cpu",
           "remote_bytes": 0, "method": REPLAYS}  # fmt: skip
    cells = [{**row, "milliseconds": each, **changed} for each in milliseconds]
    return {"benchmark": "decode_step", "ceilings": CEILINGS, "arguments": arguments,
            "cells": cells}  # fmt: skip


def test_a_step_is_predicted_whole_from_its_graph() -> None:
    (found,) = compare_steps("decode_step", steps(1.0))
    predicted = found.error + 1
    kernels = 4 + 1 + 3 + 2  # products, attention, and what Inductor fuses, at least
    assert kernels * 2e-3 < predicted < 0.1, "milliseconds"
    right, twice = compare_steps("decode_step", steps(predicted, 2 * predicted))
    assert right.error == pytest.approx(0.0, abs=1e-9) and twice.error == pytest.approx(-0.5)
    assert {found.phase, right.phase} == {"decode step"} and found.remote == "to 1%"


@pytest.mark.parametrize(
    "changed",
    [{"provider": "resident inductor"}, {"status": "failed"}, {"method": "eager calls"}],
)
def test_steps_of_others_and_calls_from_the_host_are_not_compared(changed: dict[str, str]) -> None:
    assert compare_steps("decode_step", steps(1.0, **changed)) == []


def test_operators_steps_and_whole_models_have_verdicts_of_their_own() -> None:
    right = (0.5 * 2 * 4096 * 4096 / 5e10 + FLOOR) * 1e6
    grid = compare("linear", {"ceilings": CEILINGS, "cells": [linear(right)]})
    names = [verdict.name for verdict in verdicts(grid)]
    assert names == ["median error", "worst error"]
    step = compare_steps("decode_step", steps(9.0))
    models = [replace(step[0], record="models_peer", error=0.01)]
    found = verdicts([*grid, *step, *models])
    kinds = ("", ", steps", ", whole models")
    assert [v.name for v in found] == [
        f"{which} error{kind}" for kind in kinds for which in ("median", "worst")
    ]
    assert [v.passed for v in found] == [True, True, False, False, True, True]


def test_a_later_record_of_a_step_counts_alone() -> None:
    old, new = ({**steps(1.0), "date": date} for date in ("2026-11-22", "2026-11-23"))
    old["cells"].append({**old["cells"][0], "fraction": 0.5})
    found = newest_steps({"new": new, "old": old})
    assert [cell["fraction"] for cell in found["old"]["cells"]] == [0.5]
    assert found["new"]["cells"] == new["cells"]


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
    assert {row["phase"] for row in record["cells"]} == {
        "decode", "prefill", "decode step", "prefill step", "forward step",
    }  # fmt: skip
    for name in (*check_cost_model.STEPS, *check_cost_model.MODELS):
        assert sum(row["cells"] for row in record["cells"] if row["record"] == name) > 0, name


def test_another_record_is_refused() -> None:
    with pytest.raises(SystemExit, match="no grid"):
        check_cost_model.main([str(RESULTS / "load.json")])
