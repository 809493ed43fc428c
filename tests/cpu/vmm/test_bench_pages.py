"""The benchmark of host pages runs whole on the stand-in driver."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dak_inductor.benchmarks import bench_pages
from dak_inductor.cuda_runtime.vmm import VmmTier


def test_every_cell_is_measured(fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = VmmTier("cpu", torch.device("cuda", 0), None)
    monkeypatch.setattr(bench_pages, "open_tier", lambda *_, **__: tier)
    monkeypatch.setattr(bench_pages, "warm_host_memory", lambda nbytes: None)
    status = bench_pages.main(
        ["--out", str(tmp_path), "--remote", "cpu", "--quick", "--total", "16MiB",
         "--tensor", "4MiB", "--handles", "2MiB,4MiB", "--creators", "1,2",
         "--folder", str(tmp_path)]
    )  # fmt: skip
    record = json.loads((tmp_path / "pages.json").read_text())
    assert status == 0
    stages = [row["stages"] for row in record["cells"]]
    assert stages.count("create") == 4
    assert {"map", "set access", "fill from a file", "all at once, from a file"} <= {*stages}
    assert all(row["bytes"] > 0 or "beside" in row["stages"] for row in record["cells"])
    assert record["verdicts"][0]["passed"] is None


def test_only_the_host_tier_of_a_gpu_is_measured(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="simulated"):
        bench_pages.main(["--out", str(tmp_path), "--remote", "simulated"])
