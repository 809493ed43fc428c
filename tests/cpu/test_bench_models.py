"""`dak bench`: cases, whole models and their peers, workers that die, records that are resumed."""

from __future__ import annotations

import functools
import io
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from typer.testing import CliRunner

from dak_inductor import plan_command
from dak_inductor.benchmarks import bench_models
from dak_inductor.benchmarks.bench_models import BenchRequest, cases_of
from dak_inductor.benchmarks.harness import model_measure, model_prediction, model_worker
from dak_inductor.benchmarks.harness.compile_caches import CompileCaches
from dak_inductor.benchmarks.harness.model_cards import card_groups, run_together, shared_out
from dak_inductor.benchmarks.harness.model_case import (
    BY_NAME_ALONE,
    DECODERS,
    MEASURED,
    MODELS,
    PREDICTION,
    SIMULATION,
    Case,
    config_values,
    whole_model_providers,
)
from dak_inductor.benchmarks.harness.model_measure import Machine, build, run_case
from dak_inductor.benchmarks.harness.model_prediction import Predictor, sequence_length
from dak_inductor.benchmarks.harness.model_run import Limits, Listener, ModelRun
from dak_inductor.benchmarks.harness.model_verdicts import table_rows, verdicts
from dak_inductor.benchmarks.harness.timing import TimingRule
from dak_inductor.benchmarks.harness.whole_model import DECODE, PREFILL
from dak_inductor.benchmarks.harness.yardstick import Ceilings
from dak_inductor.cli import ERROR_EXIT_CODE, app
from dak_inductor.config_model import build_from
from dak_inductor.errors import OptionError

CPU = torch.device("cpu")
CEILINGS = Ceilings(hbm_stream=1e10, link_direct=1e9, link_copy=1e9, matmul_flops=1e10)
REQUEST = BenchRequest(Path("unused"), quick=True)


def case(provider: str, model: str = "llama-3-8b", *, layers: int = 4, share: float = 0.3) -> Case:
    return Case(SIMULATION, model, provider, layers, 1, 8, 4, share, remote="simulated")


def test_quick_run_on_a_card_has_dak_early_and_every_peer() -> None:
    cases = cases_of(REQUEST, on_gpu=True)
    assert [c.provider for c in cases[:2]] == ["resident inductor", "dak"]
    assert {c.provider for c in cases} == set(whole_model_providers()) - set(BY_NAME_ALONE)
    assert {c.figure for c in cases} == {"measured"} and {c.layers for c in cases} == {4}
    assert len({c.key for c in cases}) == len(cases)


def test_inductors_own_graphs_run_where_they_are_asked_for() -> None:
    """They are this backend too, and no peer of it."""
    (name,) = BY_NAME_ALONE
    asked = replace(REQUEST, providers=(name,))
    assert {c.provider for c in cases_of(asked, on_gpu=True)} == {name}
    assert whole_model_providers()[name].kind == "reference"
    assert whole_model_providers()["dak"].kind == "real peer"


def test_full_run_has_every_model_and_measures_all_resident_once() -> None:
    cases = cases_of(BenchRequest(Path("unused")), on_gpu=True)
    assert {c.model for c in cases} == set(MODELS)
    resident = [c for c in cases if c.provider == "resident inductor" and c.model == "opt-30b"]
    assert {c.batch for c in resident} == {1, 16} and len(resident) == 2


def test_without_a_card_nothing_is_called_measured() -> None:
    for quick in (True, False):
        cases = cases_of(BenchRequest(Path("unused"), quick=quick), on_gpu=False)
        assert {c.figure for c in cases} == {PREDICTION, SIMULATION}
        planned = {c.model: c.layers for c in cases if c.figure == PREDICTION}
        wanted = bench_models.QUICK_PLANNED if quick else MODELS
        assert set(planned) == set(wanted) and planned["opt-30b"] == 48
    asked = BenchRequest(Path("unused"), models=("opt-30b",), shares=(0.2,), batches=(4,))
    assert {c.model for c in cases_of(asked, on_gpu=False)} == {"opt-30b"}


def test_requests_that_make_no_case_are_named_errors() -> None:
    for wrong in ({"models": ("gpt-9",)}, {"providers": ("x",)}, {"shares": (1.5,)},
                  {"batches": (0,)}, {"seconds_per_phase": 0.0},
                  {"seconds_per_phase": float("nan")}):  # fmt: skip
        with pytest.raises(OptionError):
            bench_models.check(BenchRequest(Path("unused"), **wrong))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def machine() -> Machine:
    return Machine(CPU, CEILINGS, TimingRule(target_seconds=0.003, repeats=3, warmup=1))


@pytest.mark.parametrize("provider", ["split eager", "linear prefetch eager",
                                      "layer prefetch charged eager"])  # fmt: skip
def test_peers_run_a_whole_model_accurately_with_the_share_remote(
    provider: str, machine: Machine
) -> None:
    row = run_case(case(provider), machine)
    assert row["status"] == "ok", row.get("traceback") or row.get("reason")
    share = 0.3 + 0.5 if "charged" in provider else 0.3  # room for two of four layers as slots
    assert float(str(row["realised"])) == pytest.approx(share, abs=0.02)
    for name in ("ttft_ms", "tpot_ms", "ttft T/L", "tpot T/L", "tokens_per_second", "bandwidth",
                 "local_bytes_per_token", "remote_bytes_per_token", "host_peak_bytes"):  # fmt: skip
        assert float(str(row[name])) >= 0, name
    assert row["card_peak_bytes"] is None


def test_simulations_have_bytes_and_no_times() -> None:
    without = Machine(CPU, None, TimingRule(0.003, 3, 1))
    row = run_case(case("dak", "vit-huge", layers=1), without)
    assert row["status"] == "ok", row.get("traceback") or row.get("reason")
    assert float(str(row["realised"])) == pytest.approx(0.3, abs=0.03)
    assert row["ttft_counted_remote"] == row["remote_bytes"]
    assert "ttft_ms" not in row and float(str(row["compile_seconds"])) > 0
    assert float(str(row["predicted_ttft_ms"])) > 0


def test_a_provider_compiles_a_setting_from_nothing_once() -> None:
    caches = CompileCaches()
    own = Machine(CPU, None, TimingRule(0.003, 3, 1), caches=caches)
    found = []
    for share, batch in ((0.3, 1), (0.6, 1), (0.6, 2)):
        torch._dynamo.reset()
        counters.clear()
        one = replace(case("dak", "vit-huge", layers=1), share=share, batch=batch)
        row = run_case(one, own)
        assert row["status"] == "ok", row.get("traceback") or row.get("reason")
        hits = counters["inductor"]["fxgraph_cache_hit"]
        found.append((row["compile_cold"], hits > 0))
    assert found == [(True, False), (False, True), (True, False)]
    caches.close()


def test_a_step_can_be_run_again_at_its_place() -> None:
    model = build(case("dak"), CPU)
    inputs = model.phase_inputs(batch=1, prompt=8, seed=1)
    with torch.no_grad():
        model(*inputs.arguments())
        inputs.phase = DECODE
        first = model(*inputs.arguments())
        assert torch.equal(first, model(*inputs.arguments()))
        ids = torch.cat([inputs.tensors[PREFILL], inputs.tensors[DECODE]], dim=1)
        whole = model.model(input_ids=ids).logits[:, -1]
    torch.testing.assert_close(first, whole, rtol=0.05, atol=0.02)


def test_only_linears_of_layers_may_be_remote() -> None:
    model = build(case("dak"), CPU)
    kept = model.kept_on_device()
    assert "model.lm_head.weight" in kept and "model.model.embed_tokens.weight" in kept
    assert not any("_proj" in name for name in kept)
    work = model.work(DECODE, batch=1, tokens=9, remote_bytes=1000)
    assert work.remote_bytes == 1000
    caches = 4 * 2 * 2 * 9 * 16 * 2  # layers, keys and values, heads, tokens, depth, bytes
    assert work.local_bytes == model.linear_bytes - 1000 + 512 * 64 * 2 + caches


def test_a_failing_provider_is_a_row(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: Case, machine: Machine) -> dict[str, object]:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(model_measure, "_measured", broken)
    row = run_case(case("dak"), machine)
    assert (row["status"], row["reason"]) == ("failed", "RuntimeError: no such kernel")
    assert "no such kernel" in str(row["traceback"])


@pytest.mark.parametrize("name", ["llama-3-8b", "bert-large", "vit-huge"])
def test_prediction_plans_the_real_graphs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(name: str) -> torch.nn.Module:
        return build_from(config_values(name, 1, tiny=True), name, device="meta")

    monkeypatch.setattr(model_prediction, "build_model", small)
    for module in (model_prediction, plan_command):
        monkeypatch.setattr(module, "REMOTE_PAGE", 1024)
    predictor = Predictor()
    rows = [
        predictor.row(Case(PREDICTION, name, "dak plan", 1, 2, 16, 4, share))
        for share in (0.2, 0.9)
    ]
    for row, share in zip(rows, (0.2, 0.9), strict=True):
        assert float(str(row["realised"])) == pytest.approx(share, abs=0.02)
    metric = "tpot_ms" if name == "llama-3-8b" else "ttft_ms"
    assert float(str(rows[0][metric])) < float(str(rows[1][metric]))
    assert float(str(rows[0]["remote_bytes_per_token"])) > 0


def test_an_image_has_as_many_tokens_as_patches_and_one() -> None:
    model = build_from(config_values("vit-huge", 1, tiny=True), "vit-huge", device="meta")
    assert sequence_length(model, 99) == (32 // 8) ** 2 + 1
    assert sequence_length(torch.nn.Identity(), 99) == 99


FAKE_WORKER = """
import json, os, sys, time
job = json.load(sys.stdin)
for fields in job["cases"]:
    key = KEY(fields)
    print(MARK + json.dumps({"event": "begin", "case": key}), flush=True)
    print("dak: a library speaks", flush=True)
    if fields["provider"] == "crash" and not os.path.exists(PATH): os._exit(11)
    if fields["provider"] == "hang": time.sleep(60)
    row = {"case": key, **fields, "model_layers": 32, "status": "ok", "kind": "real peer",
           "visible": os.environ.get("CUDA_VISIBLE_DEVICES")}
    print(MARK + json.dumps({"event": "row", "case": key, "row": row}), flush=True)
"""


def fake_worker(allowed: Path) -> list[str]:
    """Crashes in the case of that provider until the file `allowed` is there."""
    code = FAKE_WORKER.replace("MARK", repr(model_worker.MARK)).replace("PATH", repr(str(allowed)))
    key = (
        "lambda f: f\"{f['figure']} {f['model']} x{f['layers']} b{f['batch']} p{f['prompt']} "
        "n{f['new']} {f['share']:g} {f['remote']}: {f['provider']}\""
    )
    return [sys.executable, "-c", code.replace("KEY", f"({key})")]


def test_crash_and_hang_cost_their_own_case_alone(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    log = (tmp_path / "log").open("w")
    cases = [case(name) for name in ("one", "crash", "two", "hang", "three")]
    listener = Listener(lambda key: None, rows.append, lambda found: None)
    ModelRun(cases, {"ceilings": None}, Limits(case=2.0), listener, log,
             worker=fake_worker(tmp_path / "none")).run()  # fmt: skip
    assert [(r["provider"], r["status"]) for r in rows] == [
        ("one", "ok"), ("crash", "failed"), ("two", "ok"), ("hang", "failed"), ("three", "ok"),
    ]  # fmt: skip
    assert "exit status 11" in rows[1]["reason"] and "limit of the case" in rows[3]["reason"]
    assert "a library speaks" in (tmp_path / "log").read_text()


def test_time_limit_leaves_cases_out_and_a_dead_worker_is_no_endless_loop() -> None:
    rows: list[dict[str, Any]] = []
    listener = Listener(lambda key: None, rows.append, lambda found: None)
    cases = [case(name) for name in ("one", "two")]
    ModelRun(cases, {"ceilings": None}, Limits(begin=-1.0), listener, io.StringIO()).run()
    assert [row["status"] for row in rows] == ["left out", "left out"]
    rows.clear()
    with open("/dev/null", "w") as log:
        ModelRun(cases, {"ceilings": None}, Limits(), listener, log,
                 worker=[sys.executable, "-c", "raise SystemExit(3)"]).run()  # fmt: skip
    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert "exit status 3" in rows[0]["reason"]


@pytest.fixture
def faked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A suite of three cases whose worker crashes until the file that is returned exists."""
    allowed = tmp_path / "allowed"
    run = functools.partial(ModelRun, worker=fake_worker(allowed))
    monkeypatch.setattr(bench_models, "ModelRun", run)

    def some(request: BenchRequest, *, on_gpu: bool) -> Sequence[Case]:
        return [case(name) for name in ("one", "crash", "two")]

    monkeypatch.setattr(bench_models, "cases_of", some)
    return allowed


def test_resume_runs_what_failed_and_keeps_the_rest(tmp_path: Path, faked: Path) -> None:
    out, heard = tmp_path / "out", []
    first = bench_models.run(BenchRequest(out), on_gpu=False)
    assert [row["status"] for row in first.cells] == ["ok", "failed", "ok"]
    assert not first.passed and "bench" not in first.arguments
    faked.touch()
    second = bench_models.run(
        BenchRequest(out, resume=True), on_gpu=False,
        progress=lambda done, total, text: heard.append(text),
    )  # fmt: skip
    assert [row["status"] for row in second.cells] == ["ok", "ok", "ok"] and second.passed
    assert all("crash" in text for text in heard)
    assert [row["provider"] for row in second.cells] == ["one", "crash", "two"]
    written = json.loads((out / "models.json").read_text())
    assert [row["status"] for row in written["cells"]] == ["ok", "ok", "ok"]


def test_a_run_that_its_limit_cuts_fails_until_it_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faked: Path
) -> None:
    faked.touch()
    asked = ["bench", "--quick", "--out", str(tmp_path)]
    monkeypatch.setattr(bench_models, "QUICK_LIMITS", {False: Limits(-1.0, 0.0, 0.0)})
    cut = CliRunner().invoke(app, asked)
    assert cut.exit_code == 1
    assert "3 of 3 left out: run again with --resume" in cut.stdout and "MISS" in cut.stdout
    monkeypatch.setattr(bench_models, "QUICK_LIMITS", {False: Limits()})
    whole = CliRunner().invoke(app, [*asked, "--resume"])
    assert whole.exit_code == 0 and "MISS" not in whole.stdout


def test_a_case_that_outlasts_the_run_is_left_out_and_not_failed(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    listener = Listener(lambda key: None, rows.append, lambda found: None)
    with (tmp_path / "log").open("w") as log:
        ModelRun([case("hang"), case("next")], {"ceilings": None}, Limits(1.0, 1.5, 60.0), listener,
                 log, worker=fake_worker(tmp_path / "none")).run()  # fmt: skip
    assert [row["status"] for row in rows] == ["left out", "left out"]
    assert rows[0]["reason"] == "stopped at the limit of the run, 2 s"
    assert rows[1]["reason"] == "time limit: run again with --resume"


@pytest.mark.parametrize(
    ("cards", "remote", "groups"),
    [(1, "cpu", ["4"]), (3, "cpu", ["4", "5", "6"]), (2, "cuda:1", ["4,5"]),
     (4, "cuda:1", ["4,5", "6,7"]), (3, "cuda:1", ["4,5"]), (4, "cuda:2", ["4,5,6"])],
)  # fmt: skip
def test_each_worker_sees_its_own_cards(
    cards: int, remote: str, groups: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    found = card_groups(cards, remote, present=4)
    assert found == [{"CUDA_VISIBLE_DEVICES": group} for group in groups]
    with pytest.raises(OptionError, match="there are 4"):
        card_groups(5, remote, present=4)
    with pytest.raises(OptionError, match="takes 2 for each case"):
        card_groups(1, "cuda:1", present=4)


def test_large_batches_are_on_every_card_and_peers_together() -> None:
    cases = [
        Case(MEASURED, model, provider, 4, batch, 8, 4, 0.3)
        for model in ("llama-3-8b", "qwen2.5-14b", "mistral-7b", "opt-30b")
        for batch in (1, 16)
        for provider in ("dak", "split eager")
    ]
    lists = shared_out(cases, 2)
    assert sorted(map(len, lists)) == [8, 8]
    kinds = [{(case.model, case.batch) for case in each} for each in lists]
    assert kinds[0].isdisjoint(kinds[1])
    assert [sum(batch == 16 for _, batch in each) for each in kinds] == [2, 2]
    assert all(each == [case for case in cases if case in each] for each in lists)


def test_cards_share_the_cases_and_write_one_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faked: Path
) -> None:
    """Peers of one model and batch on one card, in their order; an option that cannot be met is
    refused before anything runs."""
    faked.touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cases = [case(name, model) for model in DECODERS[:3] for name in ("one", "two")]
    monkeypatch.setattr(bench_models, "cases_of", lambda request, on_gpu: cases)
    record = bench_models.run(BenchRequest(tmp_path, cards=2, remote="cpu"), on_gpu=True)
    assert [row["case"] for row in record.cells] == [each.key for each in cases]
    assert [row["visible"] for row in record.cells] == ["0", "0", "1", "1", "1", "1"]
    assert any("2 GPUs at the same time" in note for note in record.notes)
    with pytest.raises(OptionError, match="--cards 3: there are 2"):
        bench_models.run(BenchRequest(tmp_path, cards=3), on_gpu=True)


def test_an_error_ends_the_workers_of_all_cards(tmp_path: Path) -> None:
    def refuse(row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    def run(name: str, heard: Listener, log: Any) -> ModelRun:
        return ModelRun([case(name), case("later")], {"ceilings": None}, Limits(), heard, log,
                        worker=fake_worker(tmp_path / "none"))  # fmt: skip

    rows: list[dict[str, Any]] = []
    begun = time.monotonic()
    with (tmp_path / "log").open("w") as log:
        hangs = run("hang", Listener(lambda key: None, rows.append, lambda found: None), log)
        fails = run("one", Listener(lambda key: None, refuse, lambda found: None), log)
        with pytest.raises(KeyboardInterrupt):
            run_together([fails, hangs])
    assert time.monotonic() - begun < 30 and rows == []


def test_ceilings_of_a_worker_reach_the_record_and_the_next_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first worker measures them and dies; the second is given them."""
    code = (
        (
            "import json, sys; job = json.load(sys.stdin); key = lambda f: KEY\n"
            "if job['ceilings'] is None:\n"
            " print(MARK + json.dumps({'event': 'ceilings', 'ceilings': {'hbm': 5}}), flush=True)\n"
            ' print(MARK + \'{"event": "begin", "case": "one"}\', flush=True)\n'
            " sys.exit(9)\n"
            "assert job['ceilings'] == {'hbm': 5}\n"
            "for c in job['cases']:\n"
            " print(MARK + json.dumps({'event': 'row', 'row': {**c, 'case': c['provider'],\n"
            "       'model_layers': 32, 'status': 'ok', 'kind': 'real peer'}}), flush=True)\n"
        )
        .replace("MARK", repr(model_worker.MARK))
        .replace("KEY", "f['provider']")
    )
    monkeypatch.setattr(Case, "key", property(lambda self: self.provider))
    monkeypatch.setattr(
        bench_models, "ModelRun",
        functools.partial(ModelRun, worker=[sys.executable, "-c", code]),
    )  # fmt: skip
    monkeypatch.setattr(bench_models, "cases_of", lambda *_, **__: [case("one"), case("two")])
    record = bench_models.run(BenchRequest(tmp_path), on_gpu=True)
    assert record.ceilings == {"hbm": 5}
    assert [row["status"] for row in record.cells] == ["failed", "ok"]
    assert "exit status 9" in str(record.cells[0]["reason"])


def test_a_folder_that_cannot_be_written_is_a_named_error(tmp_path: Path, faked: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="cannot be written"):
        bench_models.run(BenchRequest(tmp_path / "file" / "out"), on_gpu=False)
    asked = BenchRequest(tmp_path, limit_seconds=12.0, quick=True)
    assert bench_models.limits(asked, on_gpu=True) == Limits(12.0)
    assert bench_models.limits(BenchRequest(tmp_path), on_gpu=True) == Limits()


def test_a_record_of_other_sources_is_not_resumed(tmp_path: Path, faked: Path) -> None:
    request = BenchRequest(tmp_path, resume=True)
    bench_models.run(request, on_gpu=False)
    path = tmp_path / "models.json"
    old = json.loads(path.read_text())
    path.write_text(json.dumps({**old, "sources_sha256": "other"}))
    with pytest.raises(OptionError, match="other sources"):
        bench_models.run(request, on_gpu=False)
    path.write_text("{")
    with pytest.raises(OptionError, match="no record"):
        bench_models.run(request, on_gpu=False)


def test_verdicts_compare_with_the_fastest_real_peer() -> None:
    def row(provider: str, kind: str, tpot: float, **more: Any) -> dict[str, Any]:
        return {"case": provider, "figure": "measured", "model": "m", "layers": 2, "batch": 1,
                "share": 0.5, "provider": provider, "kind": kind, "status": "ok", "realised": 0.5,
                "model_layers": 4, "tpot_ms": tpot, **more}  # fmt: skip

    rows = [row("dak", "real peer", 2.0), row("split", "real peer", 2.5),
            row("fast", "oracle", 1.0), row("slow", "real peer", 4.0),
            row("wrong", "real peer", 0.1, status="inaccurate")]  # fmt: skip
    made = {v.name: v for v in verdicts(rows, wanted=5, quick_seconds=170.0, on_gpu=True)}
    decode = made["dak / fastest real peer, decode, m x2, batch 1, 50%"]
    assert (decode.measured, decode.passed, decode.note) == (0.8, True, "split")
    assert made["rows failed or inaccurate"].passed is False
    assert made["quick run, every row"].passed and made["rows left out"].passed
    assert table_rows(rows)[0]["layers"] == "2/4"
    alone = verdicts(rows[1:], wanted=4, quick_seconds=None, on_gpu=True)
    assert alone[0].passed is False and alone[0].note == "no accurate row"


def test_a_row_that_was_left_out_has_passed_nothing() -> None:
    def row(provider: str, tpot: float, status: str = "ok") -> dict[str, Any]:
        return {"case": provider, "figure": "measured", "model": "m", "layers": 2, "batch": 1,
                "share": 0.5, "provider": provider, "kind": "real peer", "status": status,
                "realised": 0.5, "tpot_ms": tpot}  # fmt: skip

    def decided(*rows: dict[str, Any], wanted: int) -> dict[str, tuple[bool | None, str]]:
        made = verdicts(rows, wanted=wanted, quick_seconds=10.0, on_gpu=True)
        return {
            v.name.removesuffix(", decode, m x2, batch 1, 50%"): (v.passed, v.note) for v in made
        }

    late = row("late", 0.0, "left out")
    found = decided(row("dak", 2.0), row("split", 2.5), late, wanted=3)
    assert found["dak / fastest real peer"] == (None, "split; not yet run: late")
    assert found["rows left out"] == (False, "1 of 3 left out: run again with --resume")
    assert found["quick run, every row"][0] is False, "in time, but not whole"
    slower = decided(row("dak", 2.0), row("split", 1.5), late, wanted=3)
    assert slower["dak / fastest real peer"][0] is False, "no later row can mend that"
    assert decided(row("dak", 2.0), wanted=3)["rows left out"][1].startswith("2 of 3"), "stopped"


def test_command_line_reads_lists_and_names_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faked: Path
) -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["bench", "--out", str(tmp_path), "--shares", "0.1,0.5"])
    assert done.exit_code == 1 and "no GPU: nothing here is measured" in done.stdout
    assert "1/3" in done.stderr and "dak report" in done.stdout
    assert json.loads((tmp_path / "models.json").read_text())["arguments"]["shares"] == [0.1, 0.5]
    for wrong in (["--shares", "much"], ["--models", "gpt-9"], ["--host-memory", "9 apples"]):
        failed = runner.invoke(app, ["bench", "--out", str(tmp_path), *wrong])
        assert failed.exit_code == ERROR_EXIT_CODE
        assert failed.stderr.startswith("dak: OptionError: ")


def test_every_decoder_is_a_preset_with_layers_to_cut() -> None:
    for name in DECODERS:
        assert config_values(name, 3, tiny=False)["num_hidden_layers"] == 3
