"""What another overlap would have chosen, over recorded grids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dak_inductor.benchmarks import check_trials
from dak_inductor.benchmarks.check_trials import OVERLAPS, Choice, choices, rows
from dak_inductor.lowering.linear.trials import OVERLAP_SECONDS


def cell(kernel: float, stock: float, *, trials: tuple[float, float] | None) -> dict[str, object]:
    found = None if trials is None else {"direct": trials[0], "stock": trials[1]}
    return {
        "served_by": "direct", "microseconds": kernel, "trial_microseconds": found,
        "peers_microseconds": {"stock on split": stock},
    }  # fmt: skip


def test_regret_is_what_the_choice_takes_longer_than_the_faster_way() -> None:
    choice = Choice(kernel_trial=20.0, stock_trial=17.0, kernel=18.0, stock=15.0)
    assert choice.regret(2.9) == 0.0
    assert choice.regret(3.0) == pytest.approx(0.2), "the kernel is taken from here on"
    assert Choice(20.0, 17.0, 15.0, 18.0).regret(0.0) == pytest.approx(0.2)


def test_cells_without_a_trial_of_both_or_served_by_others_tell_nothing() -> None:
    known = cell(18.0, 15.0, trials=(20.0, 17.0))
    others = [
        {**known, "served_by": "stock"}, {**known, "peers_microseconds": {}},
        {**known, "trial_microseconds": {"direct": 20.0}}, cell(18.0, 15.0, trials=None),
    ]  # fmt: skip
    assert choices([known, *others]) == [Choice(20.0, 17.0, 18.0, 15.0)]
    assert rows("none", []) == []


def test_the_overlap_in_use_is_among_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the committed grids, both tiers together."""
    assert OVERLAP_SECONDS * 1e6 in OVERLAPS
    assert check_trials.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.count("yes") == len(check_trials.GRIDS)
    regrets = dict.fromkeys(OVERLAPS, 0.0)
    for name in check_trials.GRIDS:
        record = json.loads(
            (check_trials.project_root() / f"benchmarks/results/{name}.json").read_text()
        )
        for row in rows(name, choices(record["cells"])):
            regrets[float(str(row["overlap_us"]))] += float(str(row["mean_regret_percent"]))
    assert regrets[OVERLAP_SECONDS * 1e6] <= 1.2 * min(regrets.values())
    path = tmp_path / "small.json"
    path.write_text(json.dumps({"cells": [cell(18.0, 15.0, trials=(20.0, 17.0))]}))
    assert check_trials.main([str(path)]) == 0
    assert "small" in capsys.readouterr().out
