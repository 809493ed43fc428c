"""The pages of measurements are what the committed records say, and causes follow their rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dak_inductor.benchmarks import measurements
from dak_inductor.benchmarks.harness import attention_causes, linear_causes
from dak_inductor.benchmarks.harness.cause_tables import by_cause
from dak_inductor.benchmarks.harness.grid_record import GridRecord, Missed, load, missed
from dak_inductor.benchmarks.harness.record import project_root

ROOT = project_root()
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
PAGE = (DOCS / measurements.PAGE).read_text()
CEILINGS = {"hbm_stream": 4e12, "link_direct": 5e10, "link_copy": 5.5e10}
DECODE = "decode, M <= 32: T <= 1.05 L + 4 us"
RESIDENT = "nothing remote: T <= 1.02 C"
PREFILL = "prefill, 2% remote or more: T <= 1.10 max(L, C)"


def test_the_pages_are_those_of_the_records() -> None:
    """`python benchmarks/measurements.py --write` makes them so."""
    assert measurements.filled(PAGE, measurements.blocks(RESULTS)) == PAGE
    assert (DOCS / measurements.CELLS_PAGE).read_text() == measurements.cells_page(RESULTS)


def test_every_generated_part_is_on_the_page() -> None:
    shown = [found[2] for found in measurements.GENERATED.finditer(PAGE)]
    assert sorted(shown) == sorted(measurements.blocks(RESULTS))


def test_every_record_with_bars_is_on_the_page() -> None:
    listed = {name for names in measurements.TOPICS.values() for name in names}
    assert listed == {path.stem for path in RESULTS.glob("*.json")}


def test_every_cause_found_is_explained() -> None:
    for name in measurements.GRIDS:
        for cause in by_cause(load(RESULTS / f"{name}.json")):
            assert f"**{cause}".lower() in PAGE.lower(), f"{cause} of {name}"


@pytest.mark.parametrize("name", measurements.GRIDS)
def test_every_cell_over_a_bar_is_listed(name: str) -> None:
    section = measurements.cells_page(RESULTS).split(f"\n## {name}\n")[1].split("\n## ")[0]
    cells = json.loads((RESULTS / f"{name}.json").read_text())["cells"]
    over = sum(len(cell["over"]) for cell in cells if cell["status"] != "failed")
    assert section.count(" (+") + section.count(" (-") == over


def test_a_page_of_other_figures_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "results").symlink_to(RESULTS)
    wrong = PAGE.replace("| met |", "| **missed** |", 1)
    assert wrong != PAGE
    (tmp_path / "docs" / measurements.PAGE).write_text(wrong)
    monkeypatch.setattr(measurements, "project_root", lambda: tmp_path)
    assert measurements.main([]) == 1
    assert "not as the records have it" in capsys.readouterr().out
    assert measurements.main(["--write"]) == 0
    assert measurements.main([]) == 0
    assert (tmp_path / "docs" / measurements.PAGE).read_text() == PAGE


def linear(
    microseconds: float,
    *,
    m: int = 1,
    share: float = 0.0,
    megabytes: float = 200.0,
    resident: float = 51.0,
    way: str = "direct",
    repeats: tuple[float, ...] | None = None,
    stock: float | None = None,
    parts: tuple[int, ...] = (),
    plan: float = 0.0,
    trial: float | None = None,
    over: dict[str, float] | None = None,
) -> dict[str, Any]:
    """At 4 TB/s and 50 GB/s 200 MB take 50 us, and as long when 1.23% are remote."""
    whole, remote = megabytes * 1e6, megabytes * 1e6 * share
    bound = max((whole - remote) / 4e6, remote / 5e4)
    return {
        "shape": "1x1", "M": m, "fraction": share, "weight_bytes": whole, "remote_bytes": remote,
        "microseconds": microseconds, "L_microseconds": bound, "C_microseconds": resident,
        "served_by": way, "repeats_microseconds": repeats or (microseconds,), "over": over or {},
        "peers_microseconds": {} if stock is None else {"stock on split": stock},
        "N": 8192, "K": 28672, "ring_parts": parts, "ring_microseconds": plan,
        "trial_microseconds": None if trial is None else {"direct": trial},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("cell", "beside", "bar", "limit", "cause"),
    [
        (linear(60.0, share=0.005), 59.0, DECODE, 56.0, linear_causes.LOCAL_ALONE),
        (linear(70.0, share=0.005), 59.0, DECODE, 56.0, linear_causes.LOCAL_AND_REMOTE),
        (linear(60.0, share=0.005), 55.0, DECODE, 56.0, linear_causes.BESIDE_REMOTE),
        (linear(87.0, share=0.02), 55.0, DECODE, 86.5, linear_causes.START_AND_END),
        (linear(90.0, share=0.02), 55.0, DECODE, 88.0, linear_causes.BOTH_TO_THE_END),
        (linear(450.0, share=0.1), 55.0, DECODE, 424.0, linear_causes.NOT_ISOLATED),
        (linear(450.0, share=0.1, stock=420.0), 55.0, DECODE, 424.0, linear_causes.NOT_ISOLATED),
        (linear(450.0, share=0.1, stock=430.0), 55.0, DECODE, 424.0, linear_causes.LINK_RATE),
        (
            linear(450.0, share=0.1, repeats=(420.0, 450.0)), 55.0, DECODE, 424.0,
            linear_causes.REPEATS_APART,
        ),
        (linear(53.0, way="stock"), 53.0, RESIDENT, 52.0, linear_causes.COUNT),
        (linear(12.0, megabytes=40.0, resident=11.0), 12.0, RESIDENT, 11.2,
         linear_causes.FIXED_PART),
        (linear(54.0), 54.0, RESIDENT, 52.0, linear_causes.NOT_ISOLATED),
        (linear(56.0, resident=55.0), 56.0, "nothing remote, M <= 32: HBM >= 92%", 54.3,
         linear_causes.RESIDENT_TOO),
        (linear(56.0, resident=54.0), 56.0, "nothing remote, M <= 32: HBM >= 92%", 54.3,
         linear_causes.STREAM_RATE),
        (linear(120.0, m=512, share=0.02, resident=100.0, way="ring"), 0.0, PREFILL, 110.0,
         linear_causes.DIVIDED),
        (linear(130.0, m=512, share=0.025, resident=50.0, way="ring"), 0.0, PREFILL, 110.0,
         linear_causes.LAST_COPY),
        (linear(160.0, m=512, share=0.02, resident=100.0, way="ring"), 0.0, PREFILL, 110.0,
         linear_causes.NOT_ISOLATED),
        (linear(160.0, m=512, share=0.02, resident=100.0, way="ring", parts=(4096, 4096)), 0.0,
         PREFILL, 110.0, linear_causes.NOT_ISOLATED),
        (linear(160.0, m=512, share=0.02, resident=100.0, way="ring", parts=(4096, *(512,) * 8)),
         0.0, PREFILL, 110.0, linear_causes.PARTS),
        (linear(160.0, m=512, share=0.02, resident=100.0, way="ring", parts=(8192,), plan=131.0),
         0.0, PREFILL, 110.0, linear_causes.NOT_BESIDE),
        (linear(160.0, m=512, share=0.02, resident=100.0, way="ring", parts=(8192,), plan=129.0),
         0.0, PREFILL, 110.0, linear_causes.NOT_ISOLATED),
        (linear(160.0, m=512, share=0.005, resident=100.0, trial=120.0), 0.0, PREFILL, 110.0,
         linear_causes.KERNEL_RATE),
        (linear(160.0, m=512, share=0.005, resident=100.0, trial=105.0), 0.0, PREFILL, 110.0,
         linear_causes.NOT_ISOLATED),
        (linear(115.0, m=512, share=0.02, resident=100.0), 0.0, PREFILL, 110.0,
         linear_causes.START_AND_END),
        (linear(115.0, m=512, share=0.02, resident=100.0, way="stock"), 0.0, PREFILL, 110.0,
         linear_causes.STOCK_READS),
    ],
)  # fmt: skip
def test_causes_of_linears(
    cell: dict[str, Any], beside: float, bar: str, limit: float, cause: str
) -> None:
    others = (linear(beside, m=cell["M"]),) if cell["fraction"] else ()
    grid = GridRecord("linear", (cell, *others), CEILINGS)
    assert linear_causes.cause(grid, Missed(cell, bar, cell["microseconds"] / limit)) == cause


def attention(shape: str, microseconds: float, share: float, resident: float) -> dict[str, Any]:
    whole = 200e6
    bound = max((1 - share) * whole / 4e6, share * whole / 5e4)
    return {
        "shape": shape, "fraction": share, "cache_bytes": whole, "remote_bytes": share * whole,
        "microseconds": microseconds, "L_microseconds": bound, "C_microseconds": resident,
        "over": {},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("cell", "cause"),
    [
        (attention("8x1024x8x4x128", 75.0, 0.01, 52.0), attention_causes.BOTH_TO_THE_END),
        (attention("8x1024x8x4x128", 500.0, 0.1, 52.0), attention_causes.NOT_ISOLATED),
        (attention("8x1024x8x4x80", 500.0, 0.1, 52.0), attention_causes.HEAD_SIZE),
        (attention("8x1024x8x4x128", 60.0, 0.0, 52.0), attention_causes.FIXED_AND_RATE),
        (attention("8x1024x8x4x256", 60.0, 0.0, 52.0), attention_causes.NOT_ISOLATED),
        (attention("1x1024x8x4x128x1024", 500.0, 0.1, 150.0),
         attention_causes.ONE_AFTER_THE_OTHER),
        (attention("1x1024x8x4x128x1024", 440.0, 0.1, 150.0), attention_causes.NOT_ISOLATED),
    ],
)  # fmt: skip
def test_causes_of_attention(cell: dict[str, Any], cause: str) -> None:
    grid = GridRecord("attention", (cell, attention(cell["shape"], 55.0, 0.0, 52.0)), CEILINGS)
    assert attention_causes.cause(grid, Missed(cell, "decode", 1.1)) == cause


def test_failed_cells_are_over_no_bar(tmp_path: Path) -> None:
    cells = [
        {**linear(60.0, over={DECODE: 1.1}), "status": "ok"},
        {"shape": "1x1", "status": "failed", "over": {}},
    ]
    path = tmp_path / "linear.json"
    path.write_text(json.dumps({"cells": cells, "ceilings": CEILINGS}))
    assert [over.excess for over in missed(load(path))] == [1.1]
