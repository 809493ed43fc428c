"""The benchmark of the ring's fillers where no GPU is needed: its kernels, cells and verdicts."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dak_inductor import hardware
from dak_inductor.benchmarks import bench_fillers
from dak_inductor.benchmarks.harness import ceilings, ring_words, stream_filler
from dak_inductor.benchmarks.harness.clock import Clock
from dak_inductor.benchmarks.harness.copy_filler import CopyFiller
from dak_inductor.benchmarks.harness.device_code import KERNELS
from dak_inductor.benchmarks.harness.filler_case import columns_of
from dak_inductor.benchmarks.harness.filler_rate import gap_rows
from dak_inductor.benchmarks.harness.filler_verdicts import COLUMNS, verdicts
from dak_inductor.benchmarks.harness.record import make_record
from dak_inductor.benchmarks.harness.ring_filler import carried, free_running
from dak_inductor.benchmarks.harness.ring_load import RingLoad, ring_load
from dak_inductor.benchmarks.harness.streamer_shape import (
    HEADER_BYTES,
    MOST_STAGES,
    STORES,
    StreamerShape,
    shape_for,
)
from dak_inductor.benchmarks.harness.table import summary
from dak_inductor.benchmarks.harness.timing import TimingRule
from dak_inductor.benchmarks.harness.yardstick import Ceilings
from dak_inductor.cuda_runtime.nvrtc import assemble
from dak_inductor.cuda_runtime.window import default_window
from dak_inductor.lowering.ahead.ring_places import places
from dak_inductor.lowering.linear.trials import TRIALS

from .streamer_model import StreamerModel

WINDOW = default_window(hardware.load("h200").link("cpu"))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def harness_code(disassembler: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The disassembler, for kernels that only benchmarks have."""
    return type(disassembler)(tmp_path_factory.mktemp("cubins"), KERNELS)


def test_no_kernel_is_forgotten() -> None:
    names = {kernel.name for kernel in stream_filler.KERNELS}
    assert {path.stem for path in KERNELS.glob("*.cu")} == names
    used = {header for name in names for header, _ in assemble(name, KERNELS).headers}
    assert {path.name for path in KERNELS.glob("*.cuh")} <= used
    for path in KERNELS.glob("*.cu*"):
        assert not re.search(r"#\s*include\s*<", path.read_text())


@pytest.mark.parametrize("kernel", stream_filler.KERNELS, ids=lambda kernel: kernel.name)
def test_compiles_without_spills(kernel: Any, harness_code: Any) -> None:
    cubin = harness_code.cubin(kernel)
    assert kernel.name in cubin.symbol and "warning" not in cubin.log, cubin.log
    found = harness_code.usage(kernel)
    assert found["REG"] <= 64 and found["LOCAL"] == 0 and found["STACK"] == 0, found
    used = harness_code.opcodes(kernel)
    # divisions and spills are too slow for loops that issue copies
    assert not [code for code in used if code.startswith(("LDL", "STL", "CALL"))]


def test_the_streamer_moves_bytes_by_bulk_copies_alone(harness_code: Any) -> None:
    used = harness_code.opcodes(stream_filler.RING_STREAMER)
    copies = {code for code in used if code.startswith("UBLKCP")}
    assert len(copies) == 2, used  # to shared memory, and from it
    assert any(code.startswith("SYNCS.PHASECHK.TRANS64.TRYWAIT") for code in used)


def test_host_and_device_agree() -> None:
    text = (KERNELS / "ring_words.cuh").read_text()
    words = {name: int(value) for name, value in re.findall(r"u32 (\w+) = (\d+);", text)}
    assert words["given_up"] == ring_words.GIVEN_UP
    assert words["parts_read"] == ring_words.PARTS_READ
    assert words["arrivals"] == ring_words.ARRIVALS
    streamer = (KERNELS / "ring_streamer.cu").read_text()
    assert f"maximum_stages = {MOST_STAGES};" in streamer
    assert f"header_bytes = {HEADER_BYTES};" in streamer
    shape = StreamerShape(4, 12, 8192)
    sizes = [
        len(stream_filler.pack_parts(loaded(8192, 1), shape)),
        len(stream_filler.pack_streamer(1, 2, 3, shape)),
    ]
    asserted = [int(size) for size in re.findall(r"sizeof\(\w+\) == (\d+)", streamer)]
    assert sizes == asserted
    gate = (KERNELS / "ring_gate.cu").read_text()
    assert f"sizeof(RingGateArguments) == {len(stream_filler.pack_gate(1, 2, shape))}" in gate


def loaded(part_bytes: int, parts: int, ring_parts: int = 3) -> RingLoad:
    source = torch.randint(0, 255, (parts * part_bytes,), dtype=torch.uint8)
    ring = torch.zeros(ring_parts * part_bytes, dtype=torch.uint8)
    return ring_load(source, ring, part_bytes)


def test_parts_are_packed_with_what_they_wait_for() -> None:
    load, shape = loaded(16384, 5), StreamerShape(2, 4, 8192)
    raw = stream_filler.pack_parts(load, shape)
    found = list(stream_filler._PART.iter_unpack(raw))
    assert [part[3] for part in found] == [0, 0, 0, 1, 2]
    assert [part[2] for part in found] == [2] * 5
    assert found[3][1] == load.ring.data_ptr() and found[1][0] == load.source.data_ptr() + 16384
    unread = stream_filler.pack_parts(load.unread(), shape)
    assert {part[3] for part in stream_filler._PART.iter_unpack(unread)} == {0}


@pytest.mark.parametrize("ctas", [1, 2, 3, 4, 8, 64])
def test_shapes_fit_an_sm_and_the_window(ctas: int) -> None:
    shape = shape_for(ctas, WINDOW)
    assert shape.stages <= MOST_STAGES and shape.shared_bytes <= 227 * 1024
    assert shape.loads >= 1 and shape.stages > shape.loads + STORES
    if ctas <= 8:
        assert shape.in_flight <= WINDOW * 1.05
    if 4 <= ctas <= 8:
        assert shape.in_flight >= WINDOW * 0.9


@pytest.mark.parametrize("seed", range(40))
def test_a_streamer_brings_every_piece_and_never_waits_for_ever(seed: int) -> None:
    order = random.Random(seed)
    ctas, pieces = order.randint(1, 4), order.randint(1, 9)
    shape = StreamerShape(ctas, order.randint(1, 5), 256)
    parts, held = order.randint(1, 9), order.randint(1, 4)
    # places by bytes, pieces of 256 of them: a part starts at a multiple
    found = places([[256 * pieces]] * parts, 256 * pieces * held)
    at = [type(each)(each.offset // 256, pieces, each.after) for each in found]
    model = StreamerModel(pieces, at, shape)
    model.run(order)
    wanted = [[(part, piece) for piece in range(pieces)] for part in range(parts)]
    assert model.read == wanted
    assert model.most_in_flight <= ctas * shape.loads
    assert not any(cta.loads or cta.stores for cta in model.ctas)


@pytest.mark.parametrize("seed", range(10))
def test_who_gives_up_leaves_nothing_in_flight(seed: int) -> None:
    order = random.Random(seed)
    found = places([[1024]] * 6, 2048)
    at = [type(each)(each.offset // 256, 4, each.after) for each in found]
    model = StreamerModel(4, at, StreamerShape(2, 2, 256), patient=False)
    model.ctas.pop()  # a CTA that never runs: no part is whole
    model.run(order)
    assert model.given_up and len(model.read) == 6
    assert not any(cta.loads or cta.stores for cta in model.ctas)
    absent = StreamerModel(4, at, StreamerShape(2, 2, 256), patient=False)
    absent.run(order, streamed=False)
    assert absent.given_up and absent.read[0] == [None] * 4


def test_copies_fill_the_ring_in_the_order_of_reads() -> None:
    load = loaded(4096, 7)
    filler = CopyFiller(load, CPU)
    found: list[torch.Tensor] = []
    carried(filler, lambda part: found.append(load.held(part).clone()))()
    assert torch.equal(torch.cat(found), load.source) and filler.given_up() == ""
    free = CopyFiller(load.unread(), CPU)
    free_running(free)()
    assert torch.equal(load.held(6), load.source[6 * 4096 :])
    assert columns_of(free) == {"filler": "copies", "part_bytes": 4096}


def test_who_gave_up_is_named() -> None:
    assert ring_words.who_gave_up(0) == ""
    assert "product of part 6" in ring_words.who_gave_up(7)
    assert "place of part 2" in ring_words.who_gave_up(3 - 2**31)


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    found = bench_fillers.parse([])
    assert found.limit_seconds == 25 and found.ctas == (1, 2, 4, 8)
    assert found.source_bytes == bench_fillers.SOURCE_BYTES
    assert bench_fillers.parse(["--quick"]).source_bytes == bench_fillers.QUICK_BYTES
    found = bench_fillers.parse(["--ctas", "2,3", "--source-bytes", "512MiB"])
    assert found.ctas == (2, 3) and found.source_bytes == 512 << 20
    for wrong in (["--ctas", "0"], ["--ctas", "two"], ["--source-bytes", "1MiB"]):
        with pytest.raises(SystemExit):
            bench_fillers.parse(wrong)
    assert "1 to 64" in capsys.readouterr().err


def test_a_gpu_is_needed() -> None:
    with pytest.raises(SystemExit, match="is no GPU"):
        bench_fillers.main([])


def link_row(filler: str, mebibytes: int, gap: float, rate: float) -> dict[str, Any]:
    nbytes, parts = 1 << 30, 1024 // mebibytes
    seconds = nbytes / rate + parts * gap
    return {
        "part": "link", "filler": filler, "part_bytes": mebibytes << 20, "parts": parts,
        "nbytes": nbytes, "seconds": seconds, "gigabytes_per_second": nbytes / seconds / 1e9,
        "status": "ok",
    }  # fmt: skip


def fake_rows() -> list[dict[str, Any]]:
    rows = [
        link_row(filler, size, gap, rate)
        for size in (2, 4, 8, 16)
        for filler, gap, rate in (("copies", 3e-6, 55.6e9), ("streamer, 4 CTAs", 0.0, 51.4e9))
    ]
    for filler, over in (("none", 1.0), ("copies", 1.06), ("streamer, 4 CTAs", 1.09)):
        rows.append({"part": "beside", "filler": filler, "product": "torch.mm",
                     "over_alone": over, "seconds": 1e-4 * over, "status": "ok"})  # fmt: skip
    for binds, filler, over in (
        ("link", "copies", 1.05), ("link", "streamer, 4 CTAs", 1.1),
        ("link", "streamer, 8 CTAs", 1.2), ("hbm", "copies", 1.2),
    ):  # fmt: skip
        rows.append({"part": "step", "filler": filler, "binds": binds, "T/L": over,
                     "milliseconds": 2.0, "status": "ok"})  # fmt: skip
    return rows


def test_gaps_are_told_from_rates() -> None:
    found = {row["filler"]: row for row in gap_rows(fake_rows())}
    assert found["copies"]["gap_microseconds"] == pytest.approx(3.0)
    assert found["copies"]["gigabytes_per_second"] == pytest.approx(55.6)
    assert found["streamer, 4 CTAs"]["gap_microseconds"] == pytest.approx(0.0, abs=1e-6)
    assert gap_rows(fake_rows()[:1]) == []


def test_table_and_verdicts_of_a_record() -> None:
    rows = fake_rows()
    rows += gap_rows(rows)
    found = {verdict.name: verdict for verdict in verdicts(rows)}
    assert [verdict.passed for verdict in found.values()] == [True] + [None] * (len(found) - 1)
    step = found["step, link binds: the best streamer's T over that of copies"]
    assert step.measured == pytest.approx(1.1 / 1.05) and step.note.startswith("streamer, 4 CTAs")
    assert not any("hbm binds" in name for name in found), "no streamer was measured there"
    text = summary(
        make_record("fillers", arguments={}, cells=rows, verdicts=found.values()), COLUMNS
    )
    assert "streamer, 8 CTAs" in text and "from part to part" in text
    rows[1]["status"] = "wrong: 3 of 512 parts are not as in the source"
    assert verdicts(rows)[0].passed is False and "3 of 512" in verdicts(rows)[0].note
    assert verdicts([]) == []


def test_time_that_runs_out_is_noted() -> None:
    measured: Any = None
    clock, rule = Clock(0.0), TimingRule(target_seconds=0.1)
    case: Any = SimpleNamespace()
    assert bench_fillers.all_rows(case, measured, [], measured, rule, clock) == []
    assert len(clock.skipped) == 7 and "step, hbm binds" in clock.skipped


def test_a_record_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    link = hardware.load("h200").link("cpu")
    asked: list[Any] = []

    def rate_rows(case: Any, part_bytes: int, shapes: Any, rule: Any) -> list[dict[str, Any]]:
        asked.append([shape.ctas for shape in shapes])
        return [row for row in fake_rows() if row.get("part_bytes") == part_bytes]

    device = torch.device("cuda", 0)
    found = Ceilings(4.6e12, 51.4e9, 55.6e9, 8e14)
    monkeypatch.setattr(bench_fillers.command_line, "default_device", lambda: device)
    monkeypatch.setattr(ceilings, "measure", lambda *_, **__: found)
    monkeypatch.setattr(bench_fillers, "open_tier", lambda *_, **__: SimpleNamespace(name="cpu"))
    monkeypatch.setattr(bench_fillers, "window_of", lambda *_: SimpleNamespace(link=link))
    monkeypatch.setattr(bench_fillers, "make_case", lambda *_: None)
    monkeypatch.setattr(bench_fillers, "rate_rows", rate_rows)
    monkeypatch.setattr(bench_fillers, "step_rows", lambda *_: fake_rows()[-4:])
    monkeypatch.setattr(bench_fillers, "beside_rows", lambda *_: fake_rows()[8:11])
    before = TRIALS.enabled
    try:
        arguments = ["--out", str(tmp_path), "--remote", "cpu", "--ctas", "1,4"]
        assert bench_fillers.main([*arguments, "--limit-seconds", "600"]) == 0
    finally:
        TRIALS.switch(before)
    record = json.loads((tmp_path / "fillers.json").read_text())
    assert asked == [[1, 4]] * 4
    assert {cell["part"] for cell in record["cells"]} == {"link", "gap", "beside", "step"}
    assert f"window by the profile: {WINDOW} bytes" in record["notes"][0]
