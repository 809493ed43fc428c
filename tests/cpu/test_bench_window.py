"""The window's benchmark where no GPU is needed: its cells and verdicts."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from dak_inductor.benchmarks import bench_window
from dak_inductor.benchmarks.harness.record import make_record
from dak_inductor.benchmarks.harness.window_case import CopySpan, Launch, Setting
from dak_inductor.benchmarks.harness.window_rows import (
    best_fixed_verdicts,
    copy_rows,
    copy_verdicts,
    row,
    start_verdicts,
    window_history,
)
from dak_inductor.cuda_runtime.window_history import update_entry
from dak_inductor.report.window_history import updates_of

PRODUCT: Any = SimpleNamespace(remote_bytes=10_280_000, local_bytes=462_000_000)
AUTO, NONE = Setting("auto", 400_000), Setting("none", 0)
COPY = CopySpan(10**9, 0.02, 0.06)


def series(before: float, during: float) -> list[Launch]:
    """Launches of those lengths, before and after the copy or during it."""
    launches, now = [], 0.0
    while now < 0.1:
        inside = COPY.begun <= now < COPY.ended
        seconds = during if inside else before
        launches.append(Launch(now, seconds))
        now += seconds
    return launches


def test_starts_are_compared_with_the_best_fixed_window() -> None:
    rows = [
        row(f"{part}, settled", Setting(mode, start), PRODUCT, seconds)
        for part in ("link", "hbm")
        for mode, start, seconds in (
            ("fixed", 50_000, 4e-4), ("fixed", 400_000, 2e-4),
            ("auto", 50_000, 2.02e-4), ("auto", 9_600_000, 2e-4), ("wide", 50_000, 2.2e-4),
        )
    ]  # fmt: skip
    found = {verdict.name[:10].rstrip(): verdict for verdict in start_verdicts(rows)}
    assert [verdict.passed for verdict in start_verdicts(rows)] == [True, False, True, False]
    assert found["link, auto"].measured == pytest.approx(2 / 2.02)
    (best,) = best_fixed_verdicts(rows)
    assert best.passed is None and best.measured == pytest.approx(2 / 2.02)


def test_a_copy_has_bars_for_the_link_and_for_hbm() -> None:
    rows = [
        *copy_rows(AUTO, PRODUCT, "link", series(2e-4, 3.6e-4), COPY),
        *copy_rows(AUTO, PRODUCT, "hbm", series(1e-4, 1.068e-4), COPY),
        *copy_rows(NONE, PRODUCT, "resident", series(1e-4, 1.06e-4), COPY),
    ]
    parts = {each["part"] for each in rows}
    assert {"link before a copy", "link during a copy", "link after a copy"} <= parts
    verdicts = copy_verdicts(rows, 55.6e9)
    assert [verdict.passed for verdict in verdicts] == [True, True, True]
    assert verdicts[0].measured == pytest.approx((10.28 / 0.36 + 25) / 55.6, rel=1e-3)
    worse = [
        {**each, "hbm_gigabytes_per_second": each["hbm_gigabytes_per_second"] * 0.9}
        if each["part"] == "hbm during a copy" else each
        for each in rows
    ]  # fmt: skip
    assert [verdict.passed for verdict in copy_verdicts(worse, 55.6e9)] == [True, False, True]


def test_nothing_measured_gives_no_verdict() -> None:
    assert not start_verdicts([]) and not copy_verdicts([], 1e9) and not best_fixed_verdicts([])


def change(part: str, mode: str, start: int, seconds: float, window: int) -> dict[str, Any]:
    return {"part": part, "mode": mode, "start_window": start, "gpu_seconds": seconds,
            "window": window, "delay_seconds": 7.5e-6}  # fmt: skip


def test_a_record_has_the_history_of_the_last_series() -> None:
    rows = [
        change("change", "auto", 50_000, 1.0, 100_000),
        change("change", "auto", 400_000, 2.0, 350_000),
        change("change beside a copy", "auto", 400_000, 3.0, 64_000),
        change("change beside a copy", "auto", 400_000, 3.5, 380_000),
        change("change", "wide", 400_000, 4.0, 390_000),
        row("link, settled", AUTO, PRODUCT, 2e-4),
    ]
    beside = [update_entry(3.0, 64_000, 7.5e-6), update_entry(3.5, 380_000, 7.5e-6)]
    assert window_history(rows) == beside and window_history(rows[:2]) == [
        update_entry(2.0, 350_000, 7.5e-6)
    ]
    assert window_history([]) == []
    record = make_record("window", arguments={}, cells=rows, window_history=beside)
    found = updates_of(json.loads(record.to_json())["window_history"])
    assert [(u.nanoseconds, u.window) for u in found] == [(3e9, 64_000), (3.5e9, 380_000)]
    assert found[0].delay_nanoseconds == pytest.approx(7500)
    assert "window_history" not in json.loads(make_record("x", arguments={}, cells=[]).to_json())


def test_starts_reach_from_a_quarter_of_the_floor_to_16_knees() -> None:
    found = bench_window.starts(200_000, 400_000, 600_000)
    assert (found[0], found[-1]) == (50_000, 9_600_000) and 400_000 in found


def test_time_that_runs_out_is_noted() -> None:
    clock = bench_window.Clock(0.0)
    assert not clock.allows("a cell") and clock.skipped == ["a cell"]


def test_a_gpu_is_needed() -> None:
    with pytest.raises(SystemExit, match="is no GPU"):
        bench_window.main(["--seconds", "1"])
