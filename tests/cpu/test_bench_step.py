"""`bench_step` and `bench_load` whole, on the tiny shape and the simulated tier."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dak_inductor.benchmarks import bench_load, bench_step
from dak_inductor.benchmarks.harness import ceilings, comparison, step_bars
from dak_inductor.benchmarks.harness.peers.provider import ProviderUnavailable
from dak_inductor.benchmarks.harness.timing import Timing
from dak_inductor.benchmarks.harness.yardstick import Ceilings

TINY = ["--quick", "--remote", "simulated", "--layers", "2", "--context", "16"]


@pytest.fixture(autouse=True)
def _figures_of_no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times on a CPU mean nothing: each step takes 2 ms."""
    found = Ceilings(hbm_stream=1e10, link_direct=1e9, link_copy=1e9, matmul_flops=1e10)
    monkeypatch.setattr(ceilings, "measure", lambda *_, **__: found)
    monkeypatch.setattr(comparison, "time_calls", lambda *_, **__: Timing(2e-3, (2e-3,), 1, ""))


def cells(folder: Path, name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    record = json.loads((folder / f"{name}.json").read_text())
    return record["cells"], record


def test_a_step_has_a_row_for_each_peer_and_fraction(tmp_path: Path) -> None:
    peers = "resident eager,split eager,dak"
    status = bench_step.main(
        ["--out", str(tmp_path), *TINY, "--fractions", "0.25,0.5", "--peers", peers,
         "--seconds-per-row", "0.003"]
    )  # fmt: skip
    rows, record = cells(tmp_path, "decode_step")
    assert status == 0 and {row["status"] for row in rows} == {"ok"}
    assert [(row["provider"], row["fraction"]) for row in rows] == [
        ("resident eager", 0.25), ("split eager", 0.25), ("dak", 0.25),
        ("split eager", 0.5), ("dak", 0.5),
    ]  # fmt: skip
    assert [row["realised"] for row in rows[1:]] == pytest.approx([0.25, 0.25, 0.5, 0.5], abs=0.02)
    assert {row["milliseconds"] for row in rows} == {2.0}
    *undecided, left = [verdict["passed"] for verdict in record["verdicts"]]
    assert left is True and set(undecided) == {None}, "without a GPU no time decides"


def test_rows_beyond_the_limit_are_named_and_fail_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = bench_step.main(
        ["--out", str(tmp_path), *TINY, "--fractions", "0.5", "--peers", "split eager,dak",
         "--limit-seconds", "1e-9", "--prefill"]
    )  # fmt: skip
    rows, record = cells(tmp_path, "prefill_step")
    assert status == 1 and not rows
    assert "time limit: dak at 0.5 was left out" in record["notes"]
    left = {verdict["name"]: verdict for verdict in record["verdicts"]}["rows left out"]
    assert (left["measured"], left["passed"]) == (2, False)
    assert "MISS" in capsys.readouterr().out


def test_stock_kernels_that_were_not_asked_for_have_no_bar() -> None:
    rows = [
        {"provider": "dak", "fraction": 0.5, "status": "ok", "milliseconds": 2.0},
        {"provider": "split eager", "fraction": 0.1, "status": "failed"},
        {"provider": "dak", "fraction": 0.1, "status": "ok", "milliseconds": 1.0},
    ]
    made = step_bars.verdicts(rows, (0.5, 0.1), on_gpu=True)
    assert [(verdict.passed, verdict.note) for verdict in made] == [
        (False, "no accurate row of stock on split")
    ]


@pytest.mark.parametrize(
    ("error", "status"),
    [(ProviderUnavailable("two cards needed"), "unavailable"), (ValueError("odd"), "failed")],
)
def test_a_peer_that_fails_is_a_row_with_its_reason(
    error: Exception, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    peers = bench_step.all_providers()
    monkeypatch.setattr(type(peers["split eager"]), "prepare", fail)
    monkeypatch.setattr(bench_step, "all_providers", lambda: peers)
    asked = ["--out", str(tmp_path), *TINY, "--fractions", "0.5", "--peers",
             "split eager,resident eager"]  # fmt: skip
    assert bench_step.main(asked) == 1
    rows, record = cells(tmp_path, "decode_step")
    assert [row["status"] for row in rows] == [status, "ok"]
    assert str(error) in rows[0]["note"]
    assert record["verdicts"][0]["note"] == "no accurate row of dak"


def test_a_load_reads_the_file_into_the_remote_tier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--out", str(tmp_path), "--quick", "--remote", "simulated", "--shape", "tiny",
             "--folder", str(tmp_path)]  # fmt: skip
    assert bench_load.main(asked) == 0
    rows, record = cells(tmp_path, "load")
    assert [row["repeat"] for row in rows] == [0, 1]
    layer = bench_load.SHAPES["tiny"].layer_elements * 2
    assert all(row["remote_bytes"] >= 2 * layer and row["contents_same"] for row in rows)
    decided = {verdict["name"]: verdict["passed"] for verdict in record["verdicts"]}
    assert decided["load rate"] is None and decided["contents as in the file"] is True
    assert [path.name for path in tmp_path.iterdir()] == ["load.json"], "the file is gone"
    monkeypatch.setattr(bench_load, "same_contents", lambda *_: False)
    assert bench_load.main(asked) == 1


def test_a_load_slower_than_making_its_pages_is_a_miss() -> None:
    def rows(rate: float, pages: int) -> list[dict[str, object]]:
        return [
            {"gigabytes_per_second": rate, "allowed": 110.0, "pages_held": pages,
             "system_used": 100, "remote_bytes": 100, "contents_same": True}
        ]  # fmt: skip

    def passed(rate: float, pages: int, making: float | None) -> list[bool | None]:
        return [v.passed for v in bench_load.verdicts(rows(rate, pages), making, decides=True)]

    assert passed(6.0, 104, 6.5e9) == [True, True, True, True, True]
    assert passed(4.0, 104, 6.5e9) == [False, False, True, True, True]
    assert passed(6.0, 128, None) == [True, False, True, True]


def test_the_drivers_part_of_a_load_is_timed_and_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []
    monkeypatch.setattr(bench_load.vmm, "drain", lambda seconds: made.append(-1) or True)
    native = SimpleNamespace(make=lambda nbytes, node: made.append(nbytes))
    tier: Any = SimpleNamespace(_tier=native)
    rate = bench_load.page_rate(tier, 3 * bench_load.PAGES_AT_ONCE + 5)
    assert rate > 0 and made == [bench_load.PAGES_AT_ONCE] * 3 + [-1]


def test_a_step_that_fits_the_cache_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_step.command_line, "default_device", lambda: torch.device("cuda", 0))
    properties = SimpleNamespace(L2_cache_size=60 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(bench_step, "make_reference", lambda _: None)
    bench_step.main(["--out", str(tmp_path), *TINY, "--peers", "dak", "--limit-seconds", "1e-9"])
    _, record = cells(tmp_path, "decode_step")
    assert "the cache is measured too" in record["notes"][1]
