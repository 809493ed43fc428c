"""The benchmark of single linears on a card: the kernel itself is measured, and it counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dak_inductor.benchmarks import bench_linear
from dak_inductor.benchmarks.harness import ceilings, linear_peers
from dak_inductor.benchmarks.harness.yardstick import Ceilings

CEILINGS = Ceilings(hbm_stream=4.6e12, link_direct=5e10, link_copy=5e10, matmul_flops=8e14)


@pytest.mark.alone
def test_a_small_grid_is_measured_and_counted(
    tmp_path: Path, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "measure", lambda *_, **__: CEILINGS)
    bench_linear.main(
        ["--out", str(tmp_path), "--remote", remote, "--shapes", "1000x4104", "--m", "1,128,300",
         "--fractions", "0,0.25", "--seconds-per-cell", "0.01", "--peers", "all"]
    )  # fmt: skip
    read = json.loads((tmp_path / "linear.json").read_text())
    l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    assert len(read["cells"]) == 2 * 3
    for row in read["cells"]:
        assert row["status"] == "ok", row.get("traceback") or row["status"]
        assert row["counted_by"] == "kernel"
        assert row["weights_in_rotation"] * row["weight_bytes"] >= 3 * l2_bytes
        assert row["T/L"] > 0 and row["T/C"] > 0
        if row["fraction"]:
            assert row["amplification"] == pytest.approx(1, abs=0.05)
            assert set(row["peers_microseconds"]) == {linear_peers.STOCK, linear_peers.PREFETCH}
