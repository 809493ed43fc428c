"""The soak benchmark in short: it passes, goes on where it stopped, and can fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dak_inductor.benchmarks import soak
from dak_inductor.benchmarks.harness import growth
from dak_inductor.benchmarks.harness.soak_model import SoakModel

SHORT = ["--remote", "simulated", "--uncompiled", "--every", "20"]


def run(out: Path, *options: str) -> tuple[int, dict[str, Any]]:
    status = soak.main([*SHORT, "--out", str(out), *options])
    return status, json.loads((out / "soak.json").read_text())


def test_steps_and_threads_keep_tokens_and_memory_and_go_on(tmp_path: Path) -> None:
    status, record = run(tmp_path, "--steps", "200")
    assert status == 0, record["verdicts"]
    cells = record["cells"]
    assert {cell["phase"] for cell in cells} == {"steps"} and cells[0]["moved_bytes"] > 0
    assert cells[9]["remote_bytes_read"] > cells[0]["remote_bytes_read"] > 0
    status, longer = run(tmp_path, "--steps", "20", "--minutes", "0.03", "--resume")
    assert status == 0, longer["verdicts"]
    assert longer["cells"][: len(cells)] == cells
    later = longer["cells"][len(cells) :]
    assert [cell["part"] for cell in later] == [1] * len(later)
    assert later[0]["phase"] == "steps" and later[-1]["phase"] == "threads"
    assert later[-1]["moved_bytes"] > 0 and later[-1]["sequences"] > 0
    steps = cells[-1]["steps"] + 20 + later[-1]["steps"]
    assert longer["notes"][0].startswith(f"{steps} steps in 2 parts")


def test_a_step_that_answers_otherwise_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = SoakModel.step

    def wrong(self: SoakModel, cache: Any, tokens: torch.Tensor) -> torch.Tensor:
        return right(self, cache, tokens) ^ (cache.get_seq_length() == 20)

    monkeypatch.setattr(SoakModel, "step", wrong)
    status, record = run(tmp_path, "--steps", "80")
    failed = [verdict for verdict in record["verdicts"] if verdict["passed"] is False]
    assert status == 1 and [verdict["name"][:5] for verdict in failed] == ["steps"]
    assert failed[0]["measured"] >= 2


def test_growth_is_told_from_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = [float(value) for value in torch.randn(40, generator=generator) * 1000]
    assert growth.growth(noise).within(0)
    leaking = [value + 100 * number for number, value in enumerate(noise)]
    line = growth.growth(leaking)
    assert 3000 < line.grown < 5000 and not line.within(1000)
    assert line.within(6000)
    step = growth.verdicts([{"files": 4.0 + (number > 20)} for number in range(40)], "a run")
    assert [verdict.passed for verdict in step] == [False]
    early = growth.verdicts([{"files": 4.0 + (number > 8)} for number in range(40)], "a run")
    assert [verdict.passed for verdict in early] == [True]
    assert growth.verdicts([{"files": 4.0}] * 3, "a run")[0].passed is None
