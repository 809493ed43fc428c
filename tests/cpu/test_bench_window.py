"""The window's benchmark where no GPU is needed: its cells and verdicts."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dak_inductor import hardware
from dak_inductor.benchmarks import bench_window
from dak_inductor.benchmarks.harness import ceilings, window_case
from dak_inductor.benchmarks.harness.clock import Clock
from dak_inductor.benchmarks.harness.record import make_record
from dak_inductor.benchmarks.harness.window_case import (
    CopySpan,
    Launch,
    Product,
    Setting,
    run_beside_copy,
    run_series,
)
from dak_inductor.benchmarks.harness.window_rows import (
    best_fixed_verdicts,
    copy_rows,
    copy_verdicts,
    row,
    start_verdicts,
    window_history,
)
from dak_inductor.benchmarks.harness.yardstick import Ceilings
from dak_inductor.cuda_runtime.simulated import SimulatedTier
from dak_inductor.cuda_runtime.window_history import update_entry
from dak_inductor.hardware_profile import LinkProfile
from dak_inductor.lowering.linear.trials import TRIALS
from dak_inductor.report.window_history import updates_of

from .fake_cuda import FakeCard

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
    clock = Clock(0.0)
    assert not clock.allows("a cell") and clock.skipped == ["a cell"]


def test_a_gpu_is_needed() -> None:
    with pytest.raises(SystemExit, match="is no GPU"):
        bench_window.main(["--seconds", "1"])


LINK = hardware.load("h200").link("cpu")


@dataclass
class FakeWindow:
    """Kernels under control come to the knee with their first launch."""

    link: LinkProfile = LINK
    nbytes: int = 400_000
    asked: list[tuple[Any, ...]] = field(default_factory=list)

    def set(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.asked.append(("fixed", nbytes))

    def set_automatic(self, start: int, *, limits: tuple[int, int]) -> None:
        self.nbytes = LINK.window_knee
        self.asked.append(("automatic", start, limits))

    def history(self) -> Any:
        change = SimpleNamespace(nbytes=self.nbytes, update=1, cause="step", seconds=1e-3,
                                 delay=8e-6, least_delay=7e-6, in_flight=2)  # fmt: skip
        return SimpleNamespace(changes=[change])


def product_of(card: FakeCard, window: FakeWindow, remote: int) -> Any:
    """Its time is that of the link, which a window below the knee does not fill."""

    def run() -> None:
        rate = LINK.direct_bandwidth * min(1.0, window.nbytes / LINK.window_knee)
        card.work(max(remote / rate, 1e-4))()

    bytes_by_tier = SimpleNamespace(remote=remote, local=400_000_000)
    return Product(SimpleNamespace(run=run, bytes_by_tier=bytes_by_tier), window)  # type: ignore[arg-type]


def test_a_series_has_the_times_of_its_launches(card: FakeCard) -> None:
    heard: list[int] = []
    found = run_series(card.work(0.25), 3, heard.append)  # type: ignore[arg-type]
    assert found == [Launch(0.0, 0.25), Launch(0.25, 0.25), Launch(0.5, 0.25)]
    assert heard == [0, 1, 2]


def test_a_copy_is_queued_beside_a_series_and_spans_its_time(card: FakeCard) -> None:
    source, target = torch.arange(8.0), torch.zeros(8)
    launches, copy = run_beside_copy(card.work(0.5), source, target, before=2, count=5)  # type: ignore[arg-type]
    assert torch.equal(source, target) and len(launches) == 5
    assert (copy.nbytes, copy.begun, copy.ended) == (32, 1.0, 1.0)
    assert card.calls.index("enter side") < card.calls.index("side waits for an event")
    assert CopySpan(32, 0.9, 1.6).covers(launches[2]) and not copy.covers(launches[2])


def test_a_product_is_captured_under_the_window_it_starts_with(card: FakeCard) -> None:
    window = FakeWindow()
    product = product_of(card, window, 1 << 20)
    product.captured(Setting("fixed", 50_000))
    assert window.asked == [("fixed", 50_000)]
    window.asked.clear()
    product.captured(Setting("auto", 50_000))
    wide = (16 * 1024, 16 * LINK.window_knee)
    # room for the readers of the largest window while it is captured, then the profile's limits
    limits = window_case.profile_limits(window)  # type: ignore[arg-type]
    assert window.asked == [("automatic", wide[1], wide), ("automatic", 50_000, limits)]
    window.asked.clear()
    product.captured(Setting("wide", 50_000))
    assert window.asked[-1] == ("automatic", 50_000, wide)


def test_products_are_bound_by_the_link_and_by_hbm() -> None:
    tier, device = SimulatedTier(page_bytes=4096), torch.device("cpu")
    window: Any = FakeWindow()
    hbm, link = 4e11, 2e10
    first, second = window_case.make_products(tier, window, device, hbm, link)
    seconds = window_case.LINK_SECONDS
    assert first.remote_bytes / link == pytest.approx(seconds, rel=0.01)
    assert second.remote_bytes / link == pytest.approx(seconds / 4, rel=0.01)
    for product in (first, second):
        assert product.local_bytes / hbm == pytest.approx(seconds / 2, rel=0.05)
    resident = window_case.all_local(second, tier, device)
    assert resident.remote_bytes == 0
    assert resident.local_bytes == second.local_bytes + second.remote_bytes


class OtherProcess:
    """Copies 2 GB/s as soon as it is ready."""

    returncode = 0

    def __init__(self, command: list[str], **_: Any) -> None:
        self.lines = iter(["ready\n", "2e9\n"])
        self.stdout = SimpleNamespace(readline=lambda: next(self.lines))
        self.killed = False

    def __enter__(self) -> OtherProcess:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.killed, "it does not outlive the measurement"

    def wait(self, timeout: float) -> None: ...

    def kill(self) -> None:
        self.killed = True


@pytest.fixture
def pretended(card: FakeCard, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWindow]:
    """The whole benchmark on a pretended card, whose link is full from the knee on."""
    window = FakeWindow()
    products = [product_of(card, window, remote) for remote in (10_000_000, 2_500_000, 0)]
    found = Ceilings(4e12, LINK.direct_bandwidth, LINK.direct_bandwidth, 8e14)
    tensors = torch.empty

    def empty(size: int, *, dtype: torch.dtype, **_: Any) -> torch.Tensor:
        return tensors(min(size, 64), dtype=dtype)

    def beside(step: Any, source: Any, target: Any, *, before: int, count: int) -> Any:
        launches = run_series(step, count)
        begun = launches[before].begun
        return launches, CopySpan(10**8, begun, begun + 2e-3)

    device = torch.device("cuda", 0)
    monkeypatch.setattr(bench_window, "run_beside_copy", beside)
    monkeypatch.setattr(bench_window.command_line, "default_device", lambda: device)
    monkeypatch.setattr(ceilings, "measure", lambda *_, **__: found)
    monkeypatch.setattr(bench_window, "open_tier", lambda *_, **__: SimpleNamespace(name="cpu"))
    monkeypatch.setattr(bench_window, "window_of", lambda *_: window)
    monkeypatch.setattr(bench_window, "make_products", lambda *_: tuple(products[:2]))
    monkeypatch.setattr(bench_window, "all_local", lambda *_: products[2])
    monkeypatch.setattr(bench_window, "COPY_BYTES", 10**8)
    monkeypatch.setattr(torch, "empty", empty)
    processes = SimpleNamespace(Popen=OtherProcess, PIPE=subprocess.PIPE)
    monkeypatch.setattr(bench_window, "subprocess", processes)
    before = TRIALS.enabled
    yield window
    TRIALS.switch(before)


def test_every_series_is_run_and_the_window_put_back(
    pretended: FakeWindow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--out", str(tmp_path), "--remote", "cpu", "--seconds", "600", "--quick"]
    bench_window.main(asked)
    record = json.loads((tmp_path / "window.json").read_text())
    parts = [cell["part"] for cell in record["cells"]]
    wanted = len(bench_window.starts(LINK.window_floor, 400_000, LINK.window_knee))
    assert parts.count("link, settled") >= 3 * (wanted - 1)
    assert parts.count("launch, link") == 20 * parts.count("link, settled"), "a quick series"
    beside = [c for c in record["cells"] if c["part"] == "link beside a second process"]
    assert [cell["copied_gigabytes_per_second"] for cell in beside] == [2.0]
    assert {"link before a second process", "hbm after a second process"} <= set(parts)
    assert {"resident before a copy", "change beside a copy"} <= set(parts)
    assert record["window_history"] and not record["notes"]
    assert pretended.asked[-1] == ("fixed", 400_000), "as it was"
    decided = {v["name"]: v["passed"] for v in record["verdicts"]}
    assert any("link, auto" in name and passed for name, passed in decided.items())
    assert "launch, link" not in capsys.readouterr().out, "the table has no single launches"


def test_what_no_time_is_left_for_is_named(pretended: FakeWindow, tmp_path: Path) -> None:
    asked = ["--out", str(tmp_path), "--remote", "cuda:1", "--seconds", "0"]
    assert bench_window.main(asked) == 0
    record = json.loads((tmp_path / "window_peer.json").read_text())
    assert not record["cells"] and pretended.asked == [("fixed", 400_000)]
    (note,) = record["notes"]
    assert "beside a copy" in note and "beside a second process" in note
