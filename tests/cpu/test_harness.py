"""The benchmark harness where no GPU is needed: yardstick, timing, accuracy, records, command
lines."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dak_inductor.benchmarks import (
    bench_compile,
    bench_host,
    bench_load,
    bench_long_context,
    bench_marks,
    bench_move,
    bench_step,
    generate_over_budget,
    run_all,
)
from dak_inductor.benchmarks.harness import (
    accuracy,
    command_line,
    generation,
    memory,
    record,
    step_bars,
)
from dak_inductor.benchmarks.harness.models import LLAMA3_8B, TINY, Workload
from dak_inductor.benchmarks.harness.peers.provider import Prepared
from dak_inductor.benchmarks.harness.table import table
from dak_inductor.benchmarks.harness.timing import (
    QUICK,
    Timing,
    TimingRule,
    rotation_count,
    time_calls,
)
from dak_inductor.benchmarks.harness.visible_cards import visible_cards
from dak_inductor.benchmarks.harness.yardstick import (
    Ceilings,
    Work,
    direct_bound,
    over_bound,
    step_bound,
)
from dak_inductor.lowering import marks

CPU = torch.device("cpu")
CEILINGS = Ceilings(hbm_stream=4600e9, link_direct=51e9, link_copy=55e9, matmul_flops=800e12)


def test_direct_bound_is_the_slowest_of_three() -> None:
    assert direct_bound(Work(local_bytes=4600e9), CEILINGS) == pytest.approx(1)
    assert direct_bound(Work(1, remote_bytes=102e9), CEILINGS) == pytest.approx(2)
    assert direct_bound(Work(1, 1, flops=2400e12), CEILINGS) == pytest.approx(3)


def test_step_bound_adds_up_and_takes_the_best_link() -> None:
    parts = [Work(local_bytes=2300e9, remote_bytes=55e9)] * 2
    assert step_bound(parts, CEILINGS) == pytest.approx(2)  # two remote parts at 55, not at 51
    assert step_bound([Work(local_bytes=9200e9)], CEILINGS) == pytest.approx(2)


def test_bounds_and_ceilings_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="link_copy"):
        Ceilings(hbm_stream=1.0, link_direct=1.0, link_copy=0.0, matmul_flops=1.0)
    with pytest.raises(ValueError, match="positive"):
        over_bound(1.0, 0.0)
    assert over_bound(3.0, 2.0) == 1.5


def test_workload_counts_llama_3_8b() -> None:
    workload = Workload()
    assert workload.linear_bytes == pytest.approx(3.49e9, rel=1e-3)
    assert workload.shape is LLAMA3_8B
    work = workload.work(remote_bytes=10**9)
    assert work.remote_bytes == 10**9
    assert work.local_bytes == workload.linear_bytes - 10**9 + workload.cache_bytes
    assert workload.cache_bytes == 8 * 2 * 8 * 512 * 128 * 2


def test_one_seed_gives_one_model_and_the_linears_match_the_count() -> None:
    workload = Workload(shape=TINY, context=16)
    first, second = workload.build(CPU), workload.build(CPU)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    assert sum(linear.weight.nbytes for _, _, linear in first.linears()) == workload.linear_bytes
    inputs = workload.inputs(CPU)
    with torch.no_grad():
        assert first(*inputs.arguments()).shape == (1, 1, TINY.hidden)


def test_rotation_outgrows_the_cache() -> None:
    assert rotation_count(60 << 20, 60 << 20) == 3
    assert rotation_count(4 << 30, 60 << 20) == 1
    with pytest.raises(ValueError):
        rotation_count(0, 60 << 20)


def test_time_calls_reports_seconds_per_step() -> None:
    calls: list[int] = []

    def step(index: int) -> None:
        calls.append(index)
        time.sleep(0.002)

    rule = TimingRule(target_seconds=0.06, repeats=3, warmup=1)
    timing = time_calls(
        [lambda: step(0), lambda: step(1)], device=CPU, rule=rule, method="eager calls"
    )
    assert 0.002 <= timing.seconds < 0.02
    assert len(timing.repeats) == 3
    assert calls.count(0) == calls.count(1)  # every rotated input is used alike
    with pytest.raises(ValueError, match="no step"):
        time_calls([], device=CPU, rule=rule, method="")


def test_spread_is_relative_to_the_median() -> None:
    assert Timing(2.0, (1.0, 2.0, 3.0), 1, "").spread == 1.0


def test_accuracy_allows_twice_torch_and_never_a_nan() -> None:
    exact = torch.zeros(4)
    own = accuracy.errors(torch.full((4,), 0.1), exact)
    assert accuracy.judge(accuracy.errors(torch.full((4,), 0.19), exact), own).passed
    assert not accuracy.judge(accuracy.errors(torch.full((4,), 0.21), exact), own).passed
    broken = torch.tensor([0.0, 0.0, 0.0, math.nan])
    assert accuracy.errors(broken, exact).rms == math.inf
    assert not accuracy.judge(accuracy.errors(broken, exact), own).passed
    with pytest.raises(ValueError, match="reference"):
        accuracy.errors(torch.zeros(3), exact)


def test_tokens_count_only_where_the_margin_decides() -> None:
    exact = torch.tensor([[3.0, 0.0, 0.0], [1.0, 0.9, 0.0]])
    tie_lost = torch.tensor([[3.0, 0.0, 0.0], [0.9, 1.0, 0.0]])
    found = accuracy.token_agreement(tie_lost, exact, exact, error=0.2)
    assert (found.decided, found.agreeing, found.passed) == (1, 1, True)
    wrong = torch.tensor([[0.0, 3.0, 0.0], [1.0, 0.9, 0.0]])
    assert not accuracy.token_agreement(wrong, exact, exact, error=0.2).passed
    assert not accuracy.token_agreement(exact, exact, exact, error=9.0).passed  # proves nothing


def test_free_running_excuses_near_ties_alone() -> None:
    exact = torch.tensor([[[3.0, 0.0], [1.0, 0.9], [3.0, 0.0]]])
    resident = torch.tensor([[0, 0, 0]])
    tie = generation.free_running(torch.tensor([[0, 1, 1]]), resident, exact, error=0.2)
    assert (tie.identical, tie.first_partings, tie.excused) == (0, (1,), True)
    wrong = generation.free_running(torch.tensor([[1, 0, 0]]), resident, exact, error=0.2)
    assert not wrong.excused
    same = generation.free_running(resident, resident, exact, error=0.2)
    assert (same.identical, same.excused) == (1, True)


def test_forced_tokens_win_and_the_logits_are_kept() -> None:
    forced = generation.Forced(torch.tensor([[2, 0], [1, 1]]))
    for wanted in ([2, 1], [0, 1]):
        logits = torch.randn(2, 3)
        kept = forced(torch.zeros(2, 1), logits.clone())
        assert kept.argmax(-1).tolist() == wanted
        assert torch.equal(forced.logits[-1], logits)


def test_a_long_context_is_filled_read_and_judged(tmp_path: Path) -> None:
    assert bench_long_context.main(["--out", str(tmp_path), "--remote", "simulated"]) == 0
    record = json.loads((tmp_path / "long_context.json").read_text())
    (row,) = record["cells"]
    assert row["tokens"] >= bench_long_context.TINY_TOKENS and row["cache_remote"] > 0
    assert row["prefill_tokens"] == bench_long_context.TINY_PREFILL
    assert {verdict["passed"] for verdict in record["verdicts"]} == {True, None}


def test_over_budget_compares_tokens_logits_and_remote_bytes(tmp_path: Path) -> None:
    exact = torch.randn(2, 5, 50) * 4
    own, tokens = exact + 0.01 * torch.randn_like(exact), exact.argmax(-1)
    torch.save({"tokens": tokens, "own": own, "exact": exact}, tmp_path / "reference.pt")

    def judged(logits: torch.Tensor, ours: torch.Tensor, remote_bytes: int) -> dict[str, bool]:
        found = {
            "tokens": ours, "first_tokens": tokens, "logits": logits, "remote_bytes": remote_bytes,
            "card_before": 0, "card_peak": 0, "offload_seconds": 1.0, "generate_seconds": 1.0,
            "explain": "",
        }  # fmt: skip
        torch.save(found, tmp_path / "offloaded.pt")
        _, verdicts = generate_over_budget.compare(tmp_path, gpu_memory=100, weight_bytes=150)
        return {v.name: v.passed is not False for v in verdicts}

    assert all(judged(own, tokens, 60).values())
    far = judged(exact + 0.1 * torch.randn_like(exact), tokens, 60)
    assert not far["logits' RMS error over torch's own"]
    assert not judged(own, tokens, 0)["remote bytes"]
    margin = generation.margins(exact)
    row, position = divmod(int(margin.argmax()), 5)
    wrong = tokens.clone()
    wrong[row, position] += 1
    assert not judged(own, wrong, 60)["free-running tokens agree to a near-tie"]


def test_record_is_written_whole_and_read_back(tmp_path: Path) -> None:
    verdicts = [record.Verdict("a", 1.0, 2.0, "x", True), record.Verdict("b", None, 2.0, "x", None)]
    made = record.make_record(
        "sample", arguments={"device": CPU}, cells=[{"error": math.inf}], verdicts=verdicts
    )
    path = made.write(tmp_path)
    read = json.loads(path.read_text())
    assert read["cells"] == [{"error": "inf"}]
    assert '\n  {"error": "inf"}\n' in path.read_text(), "a cell is a line"
    assert read["arguments"] == {"device": "cpu"}
    assert read["environment"]["torch"] == torch.__version__
    assert len(read["sources_sha256"]) == 64
    assert {"date", "command", "parent_commit", "schema"} <= set(read)
    assert made.passed
    assert [p.name for p in tmp_path.iterdir()] == ["sample.json"]
    missed = record.make_record(
        "sample", arguments={}, cells=[], verdicts=[record.Verdict("a", 3.0, 2.0, "x", False)]
    )
    assert not missed.passed


def test_source_hash_follows_names_and_contents(tmp_path: Path) -> None:
    folder = tmp_path / "lowering"
    (folder / "__pycache__").mkdir(parents=True)
    (folder / "a.py").write_text("x = 1\n")
    first = record.sources_sha256(tmp_path)
    (folder / "__pycache__" / "a.py").write_text("ignored")
    (folder / "notes.md").write_text("ignored")
    assert record.sources_sha256(tmp_path) == first
    (folder / "a.py").write_text("x = 2\n")
    second = record.sources_sha256(tmp_path)
    (folder / "a.py").rename(folder / "b.py")
    assert len({first, second, record.sources_sha256(tmp_path)}) == 3


def test_source_files_are_found_once() -> None:
    files = record.source_files(record.project_root())
    assert len(files) == len({file.resolve() for file in files})
    assert any(file.name == "errors.py" for file in files)


def test_table_aligns_and_marks_what_is_missing() -> None:
    text = table([{"a": 1.23456, "b": None}, {"a": True}], ("a", "b"))
    assert text.splitlines()[2:] == ["1.235  -", "yes    -"]


@pytest.mark.parametrize(
    ("text", "nbytes"), [("24GB", 24 * 10**9), ("1.5GiB", 3 << 29), ("512MiB", 512 << 20), ("7", 7)]
)
def test_memory_sizes(text: str, nbytes: int) -> None:
    assert command_line.memory_bytes(text) == nbytes


def test_unreadable_options_are_refused() -> None:
    for text in ("GB", "12 parsecs", ""):
        with pytest.raises(argparse.ArgumentTypeError):
            command_line.memory_bytes(text)
    for text in ("0.1,x", "1.5", "-0.1"):
        with pytest.raises(argparse.ArgumentTypeError):
            command_line.fractions(text)
    assert command_line.fractions("0.1,0.5") == (0.1, 0.5)
    with pytest.raises(SystemExit, match="unknown peers"):
        bench_step.chosen_providers("dak,magic")
    with pytest.raises(SystemExit, match="unknown suites"):
        run_all.chosen("move,magic")


def test_decode_bar_is_against_the_faster_stock_form() -> None:
    def row(provider: str, milliseconds: float, status: str = "ok") -> dict[str, object]:
        return {
            "provider": provider, "fraction": 0.1, "milliseconds": milliseconds, "status": status,
        }  # fmt: skip

    stock = [row("split eager", 2.0), row("split inductor", 1.0)]
    (good,) = step_bars.verdicts([*stock, row("dak", 1.02)], (0.1,), on_gpu=True)
    (slow,) = step_bars.verdicts([*stock, row("dak", 1.04)], (0.1,), on_gpu=True)
    (wrong,) = step_bars.verdicts([*stock, row("dak", 0.5, "inaccurate")], (0.1,), on_gpu=True)
    (undecided,) = step_bars.verdicts([*stock, row("dak", 9.0)], (0.1,), on_gpu=False)
    assert [v.passed for v in (good, slow, wrong, undecided)] == [True, False, False, None]
    own = [row("dak direct", 0.9), row("dak staged", 0.8)]
    for ours, passed in ((0.82, True), (0.85, False)):
        _, choice = step_bars.verdicts([*stock, *own, row("dak", ours)], (0.1,), on_gpu=True)
        assert choice.passed is passed


def test_a_decode_step_is_held_against_real_peers_oracles_and_its_bound() -> None:
    def row(provider: str, kind: str, milliseconds: float, over: float) -> dict[str, object]:
        return {
            "provider": provider, "kind": kind, "fraction": 0.02, "milliseconds": milliseconds,
            "T/L": over, "status": "ok",
        }  # fmt: skip

    rows = [
        row("split inductor", "real peer", 1.0, 1.2),
        row("layer prefetch inductor", "oracle", 0.9, 1.08),
        row("dak", "real peer", 0.95, 1.14),
        row("dak direct", "real peer", 0.5, 0.6),  # no peer of ours
    ]
    found = {v.name: v for v in step_bars.verdicts(rows, (0.02,), on_gpu=True)}
    assert found["dak / fastest real peer, 2% remote"].measured == pytest.approx(0.95)
    assert found["dak / fastest real peer, 2% remote"].passed is True
    assert found["dak / fastest oracle, 2% remote"].passed is False
    assert found["dak, T / L, 2% remote"].passed is True
    assert found["dak, T / L, 2% remote"].bar == 1.15
    prefill = {v.name for v in step_bars.verdicts(rows, (0.02,), on_gpu=True, prefill=True)}
    assert prefill == found.keys() - {"dak, T / L, 2% remote"}


def test_compile_bar_fails_where_a_run_failed() -> None:
    rows: list[dict[str, object]] = [
        {"backend": "inductor", "status": "ok", "compile_seconds": 10.0},
        {"backend": "dak", "status": "ok", "compile_seconds": 10.9},
    ]
    assert bench_compile.verdict(rows, decides=True).passed is True
    rows[1]["compile_seconds"] = 11.1
    assert bench_compile.verdict(rows, decides=True).passed is False
    rows.append({"backend": "dak", "status": "failed"})
    assert bench_compile.verdict(rows, decides=False).passed is False


def test_host_memory_is_total_less_available(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  100 kB\nMemFree: 1 kB\nMemAvailable:   40 kB\n")
    assert memory.host_bytes_used(meminfo) == 60 * 1024


def test_peak_memory_sees_what_is_gone_at_the_end() -> None:
    used = [5]
    with memory.PeakMemory(lambda: used[0], interval=0.001) as sampled:
        used[0] = 9
        time.sleep(0.05)
        used[0] = 5
    assert (sampled.start, sampled.peak) == (5, 9)


def test_checkpoint_folder_needs_room(tmp_path: Path) -> None:
    assert bench_load.choose_folder(tmp_path, 1) == tmp_path
    with pytest.raises(SystemExit, match="room"):
        bench_load.choose_folder(tmp_path, 1 << 60)


def test_move_benchmark_moves_and_compares(tmp_path: Path) -> None:
    status = bench_move.main(
        ["--out", str(tmp_path), "--remote", "simulated", "--move", "1MiB", "--columns", "64",
         "--cycles", "2"]
    )  # fmt: skip
    read = json.loads((tmp_path / "move.json").read_text())
    assert status == 0
    assert [cell["moved_bytes"] for cell in read["cells"]] == [1 << 20] * 4
    assert [cell["direction"] for cell in read["cells"][:2]] == ["to remote", "to local"]


def test_what_ranges_cost_is_measured_on_any_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU nothing is decided; without NVTX nothing is measured, and a note says so."""

    def step() -> torch.Tensor:
        with marks.MARKS.of("graph", "g"), marks.MARKS.of("direct", "a"):
            return torch.zeros(8).add(1)

    provider = SimpleNamespace(prepare=lambda *_: Prepared(step, 0, 0))
    monkeypatch.setattr(bench_marks, "DakBackend", lambda: provider)
    asked = ["--out", str(tmp_path), "--quick", "--remote", "simulated"]
    assert bench_marks.main(asked) == 0
    record = json.loads((tmp_path / "marks.json").read_text())
    assert not record["cells"] and any("NVTX" in note for note in record["notes"])
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", seen.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: None)
    monkeypatch.setattr(torch._C, "_nvtx", None, raising=False)
    marks.nvtx_range.cache_clear()
    assert bench_marks.main(asked) == 0 and {"dak graph g", "dak direct a"} <= set(seen)
    marks.nvtx_range.cache_clear()
    record = json.loads((tmp_path / "marks.json").read_text())
    blocks, alone = record["cells"]
    assert blocks["with_milliseconds"] > 0 and alone["method"] == "2 ranges around nothing"
    assert 0 < alone["lowest"] <= alone["cost"] <= alone["highest"]
    assert [verdict["passed"] for verdict in record["verdicts"]] == [None, None]
    assert not marks.MARKS.nvtx


def test_what_products_take_of_the_host_is_measured_on_any_machine(tmp_path: Path) -> None:
    asked = ["--out", str(tmp_path), "--quick", "--remote", "simulated", "--products", "2",
             "--width", "256"]  # fmt: skip
    assert bench_host.main(asked) == 0
    record = json.loads((tmp_path / "host.json").read_text())
    assert [cell["way"] for cell in record["cells"]] == [case.way for case in bench_host.CASES]
    assert all(cell["host_microseconds"] > 0 for cell in record["cells"])
    assert any("no GPU" in note for note in record["notes"])


def test_products_that_are_not_served_are_no_measurement() -> None:
    chain = bench_host.Chain(2, 8, torch.device("cpu"))
    with torch.no_grad(), pytest.raises(RuntimeError, match="0 of 2 products"):
        bench_host.check_served(chain, torch.zeros(1, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("costs", "passed"),
    [((0.001, 0.004, 0.02), True), ((0.006, 0.007, 0.008), False), ((-0.02, 0.006, 0.02), None)],
)
def test_a_cost_above_the_bar_is_missed_where_it_is_sure(
    costs: tuple[float, ...], passed: bool | None
) -> None:
    row = bench_marks.row_of("ranges", [1 + cost for cost in costs * 2], [1.0] * 6, "blocks")
    assert row["cost"] == pytest.approx(costs[1])
    (verdict,) = bench_marks.verdicts([row], on_gpu=True)
    assert verdict.passed is passed and verdict.bar == 0.005


@pytest.mark.parametrize("count", [6, 12, 24, 61])
def test_a_median_is_seldom_outside_of_its_confidence_interval(count: int) -> None:
    chance, edge = random.Random(count), bench_marks.confidence_edge(count)
    draws = [sorted(chance.gauss(0, 1) for _ in range(count)) for _ in range(4000)]
    inside = sum(draw[edge] <= 0 <= draw[-1 - edge] for draw in draws) / len(draws)
    assert inside >= 0.94
    narrower = sum(draw[edge + 1] <= 0 <= draw[-2 - edge] for draw in draws) / len(draws)
    assert narrower < 0.955


def test_captures_that_differ_by_chance_or_by_their_order_cost_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three captures in a round, the first of which is the slowest; counts cost 0.4%."""
    chance, orders = random.Random(0), list[tuple[str, ...]]()

    def time_in_turn(graphs: list[str], **_: object) -> list[Timing]:
        orders.append(tuple(graphs))
        seconds = [
            (1.0 + 0.02 * (place == 0) + chance.gauss(0, 5e-4)) / (1.004 if kind == "quiet" else 1)
            for place, kind in enumerate(graphs)
        ]
        return [Timing(each, (each,), 1, "") for each in seconds]

    monkeypatch.setattr(bench_marks, "captured", lambda kind, step: kind)
    monkeypatch.setattr(bench_marks, "time_in_turn", time_in_turn)
    made = bench_marks.replay_seconds(lambda: None, torch.device("cuda"), QUICK, bench_marks.ROUNDS)
    assert len(orders) == bench_marks.ROUNDS and len(set(orders)) == 6
    ranges = bench_marks.row_of("ranges", made["named"], made["plain"], "")
    counts = bench_marks.row_of("counts", made["plain"], made["quiet"], "")
    assert ranges["cost"] == pytest.approx(0.0, abs=1e-3)
    assert counts["cost"] == pytest.approx(0.004, abs=1e-3)


def test_run_all_says_what_did_not_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suites = {"none": run_all.Suite("no_such_module", "none", limit=60)}
    monkeypatch.setattr(run_all, "SUITES", suites)
    (tmp_path / "none.json").write_text("{}")  # a stale record must not pass for a new one
    status = run_all.main(["--out", str(tmp_path), "--suites", "none", "--remote", "simulated"])
    assert status == 1
    assert "did not finish" in capsys.readouterr().out
    assert "no_such_module" in (tmp_path / "run_all.log").read_text()


def test_run_all_reads_a_suite_with_its_own_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suites = {"plans": run_all.Suite("bench_planner", "plans", alone=True)}
    monkeypatch.setattr(run_all, "SUITES", suites)
    (tmp_path / "plans.json").write_text(json.dumps({"bars": {"fast": True, "exact": False}}))
    rows = run_all.rows_of("plans", "", 1.0, tmp_path)
    assert [row["verdict"] for row in rows] == ["pass", "MISS", ""]


@torch.no_grad()
def test_a_prefill_step_sees_no_later_token_and_counts_all_of_them() -> None:
    device = torch.device("cpu")
    prefill = Workload(TINY, batch=2, context=16, dtype=torch.float32, prefill=True)
    model, inputs = prefill.build(device), prefill.inputs(device)
    before = model(*inputs.arguments())
    inputs.hidden[:, 8:] += 1
    after = model(*inputs.arguments())
    torch.testing.assert_close(after[:, :8], before[:, :8])
    assert not torch.allclose(after[:, 8:], before[:, 8:])
    decode = dataclasses.replace(prefill, prefill=False)
    assert decode.inputs(device).hidden.shape == (2, 1, TINY.hidden)
    linear = 2 * 2 * TINY.linear_elements
    assert prefill.work(0).flops - 16 * linear == 8 * (decode.work(0).flops - linear)


def test_visible_cards_are_those_named_else_all_that_are_there() -> None:
    assert visible_cards({}, 3) == ["0", "1", "2"]
    assert visible_cards({"CUDA_VISIBLE_DEVICES": "4,GPU-b"}, 3) == ["4", "GPU-b"]
