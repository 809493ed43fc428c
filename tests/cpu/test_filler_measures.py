"""Measures of the ring's fillers on the CPU, with kernels that do at once what a GPU's do."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dak_inductor.benchmarks.harness import (
    filler_beside,
    filler_case,
    filler_rate,
    filler_step,
    ring_words,
    stream_filler,
)
from dak_inductor.benchmarks.harness.filler_beside import BesideTime
from dak_inductor.benchmarks.harness.filler_case import FillerCase
from dak_inductor.benchmarks.harness.streamer_shape import StreamerShape
from dak_inductor.benchmarks.harness.timing import TimingRule
from dak_inductor.benchmarks.harness.yardstick import Ceilings
from dak_inductor.cuda_runtime.simulated import SimulatedTier

from .fake_cuda import FakeCard

CPU = torch.device("cpu")
RULE = TimingRule(target_seconds=0.01, warmup=0)
SHAPES = [StreamerShape(1, 4, 4096), StreamerShape(2, 4, 8192)]
CEILINGS = Ceilings(4e9, 5e8, 5e8, 1e12)


class FakeKernels:
    """A streamer that brings a part when its gate asks for it, or never."""

    def __init__(self) -> None:
        self.ready, self.parts, self.pieces = True, 0, 0

    def of(self, kernel: Any, index: int) -> Any:
        return _Launcher(self.stream if kernel is stream_filler.RING_STREAMER else self.gate)

    def stream(self, arguments: bytes) -> None:
        self.parts, _, count, self.pieces, *_ = stream_filler._STREAMER.unpack(arguments)
        assert count > 0

    def gate(self, arguments: bytes) -> None:
        words, number, _, _ = stream_filler._GATE.unpack(arguments)
        given_up = ctypes.c_int32.from_address(words + 4 * ring_words.GIVEN_UP)
        if not self.ready:
            given_up.value = number + 1
        if given_up.value == 0:
            size = stream_filler._PART.size
            raw = ctypes.string_at(self.parts + number * size, size)
            source, target, pieces, after = stream_filler._PART.unpack(raw)
            assert after <= number
            ctypes.memmove(target, source, pieces * self.pieces)


class _Launcher:
    def __init__(self, launched: Callable[[bytes], None]) -> None:
        self._launched = launched

    def prepare(self, **_: Any) -> None: ...

    def launch(self, *, arguments: list[bytes], **_: Any) -> None:
        self._launched(arguments[0])


@pytest.fixture
def kernels(card: FakeCard, monkeypatch: pytest.MonkeyPatch) -> FakeKernels:
    made = FakeKernels()
    monkeypatch.setattr(stream_filler, "loaded", made.of)
    for module in (filler_case, filler_step, filler_beside):
        monkeypatch.setattr(module, "capture", lambda step, warmup: step)
    return made


@pytest.fixture
def case() -> FillerCase:
    tier = SimulatedTier(page_bytes=4096)
    return filler_case.make_case(tier, 12 << 16, 3 << 16, CPU)


def test_every_filler_is_timed_and_checked(kernels: FakeKernels, case: FillerCase) -> None:
    rows = filler_rate.rate_rows(case, 1 << 16, SHAPES, RULE)
    assert [row["filler"] for row in rows] == ["copies", "streamer, 1 CTAs", "streamer, 2 CTAs"]
    assert all(row["status"] == "ok" and row["gigabytes_per_second"] > 0 for row in rows)
    assert [row.get("in_flight") for row in rows] == [None, 4 * 4096, 2 * 4 * 8192]
    assert rows[0]["parts"] == 12 and rows[0]["nbytes"] == 12 << 16


def test_a_streamer_that_gives_up_has_no_time_and_copies_take_its_place(
    kernels: FakeKernels, case: FillerCase
) -> None:
    kernels.ready = False
    rows = filler_rate.rate_rows(case, 1 << 16, SHAPES, RULE)
    assert [row["status"] == "ok" for row in rows] == [True, False, False]
    for row in rows[1:]:
        assert "seconds" not in row and row["status"].endswith("by copies instead: right")
        assert "the product of part" in row["status"]


def test_what_is_not_as_in_the_source_is_told(kernels: FakeKernels, case: FillerCase) -> None:
    case.reference[70_000] ^= 1
    rows = filler_rate.rate_rows(case, 1 << 16, SHAPES[:1], RULE)
    assert {row["status"] for row in rows} == {"wrong: 1 of 12 parts are not as in the source"}


def test_a_step_is_compared_with_its_bound(
    kernels: FakeKernels, case: FillerCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filler_step, "PART_BYTES", 1 << 16)
    monkeypatch.setattr(filler_step, "PRODUCTS", 5)
    rows = filler_step.step_rows(case, "link", CEILINGS, SHAPES, RULE)
    assert [row["filler"] for row in rows][:2] == ["none", "copies"]
    assert all(row["status"] == "ok" for row in rows), rows
    bound = max(5 * (128 * 16384) / CEILINGS.hbm_stream, 5 * (1 << 16) / CEILINGS.best_link)
    assert rows[1]["L_milliseconds"] == pytest.approx(bound * 1e3)
    assert rows[2]["T/L"] == pytest.approx(rows[2]["milliseconds"] / rows[2]["L_milliseconds"])
    kernels.ready = False
    rows = filler_step.step_rows(case, "hbm", CEILINGS, SHAPES[:1], RULE)
    assert rows[-1]["status"].endswith("by copies instead: right") and "T/L" not in rows[-1]


def test_outputs_of_other_rows_are_noticed(
    case: FillerCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filler_step, "PART_BYTES", 1 << 16)
    monkeypatch.setattr(filler_step, "PRODUCTS", 5)
    step = filler_step.make_step(case, 0.5, CEILINGS)
    step.outputs.fill_(float("nan"))
    step.outputs[1:] = step.wanted[1:]
    assert step.differing() == "wrong: 1 of 5 products"
    step.outputs[0] = step.wanted[1]
    assert step.differing() == "wrong: 1 of 5 products"
    step.outputs[0] = step.wanted[0]
    assert step.differing() == ""


def test_products_are_timed_beside_each_filler(
    kernels: FakeKernels, case: FillerCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filler_beside, "ROWS", 64)
    monkeypatch.setattr(filler_beside, "PART_BYTES", 1 << 16)
    ran: list[str] = []

    def time(products: Any, fill: Any, side: Any) -> BesideTime:
        products()
        if fill is None:
            return BesideTime(1.2, None, True)
        fill()
        ran.append("filled")
        return BesideTime(1.5, 3.0, len(ran) > 2)

    monkeypatch.setattr(filler_beside, "_time", time)
    rows = filler_beside.beside_rows(case, SimulatedTier(page_bytes=4096), SHAPES, 2)
    assert len(rows) == 2 * 4 and len(ran) == 3 * 2 * 3
    assert [row["over_alone"] for row in rows[:2]] == [1.0, pytest.approx(1.25)]
    assert rows[1]["gigabytes_per_second"] == pytest.approx((12 << 16) / 3e9)
    assert {row["product"] for row in rows} == {"tiered_linear", "torch.mm"}
    assert {row["status"] for row in rows} == {"ok"}, "the first round does not count"
