"""`bench_compile` and `generate_over_budget`: their processes, and what each of them does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dak_inductor.backend import compile_graph
from dak_inductor.benchmarks import bench_compile, generate_over_budget
from dak_inductor.options import BackendOptions

CHILD = """
import json, os, sys
print("a library speaks")
if "dak" in sys.argv and os.path.exists("broken"):
    raise SystemExit("no kernel")
names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "DAK_CACHE")
fresh = not any(os.path.exists(os.environ[name]) for name in names)
seconds = 2.0 + ("dak" in sys.argv)
print(json.dumps({"compile_seconds": seconds, "argv": sys.argv[1:], "fresh": fresh}))
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A child that compiles nothing, in the folder of the processes that are started."""
    (tmp_path / "fake_child.py").write_text(CHILD)
    monkeypatch.setattr(bench_compile, "MODULE", "fake_child")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_run_is_a_process_with_fresh_caches(child: Path) -> None:
    assert bench_compile.main(["--out", "out", "--cpu", "--quick", "--runs", "5"]) == 0
    record = json.loads((child / "out" / "compile_cpu.json").read_text())
    rows, (verdict,) = record["cells"], record["verdicts"]
    assert [(row["run"], row["backend"]) for row in rows] == [
        (0, "inductor"), (0, "dak"), (1, "dak"), (1, "inductor"),
    ]  # fmt: skip
    assert all(row["fresh"] and row["status"] == "ok" for row in rows)
    argv = rows[1]["argv"]
    assert argv[argv.index("--child") + 1] == "dak" and argv[-1] == "--cpu"
    assert argv[argv.index("--hidden") + 1] == "256", "a quick run is a small one"
    assert (verdict["measured"], verdict["passed"]) == (1.5, None)


def test_a_child_that_fails_is_a_row_and_a_miss(child: Path) -> None:
    (child / "broken").touch()
    assert bench_compile.main(["--out", "out", "--cpu", "--runs", "1"]) == 1
    record = json.loads((child / "out" / "compile_cpu.json").read_text())
    good, bad = record["cells"]
    assert good["status"] == "ok"
    assert (bad["status"], bad["reason"].strip()) == ("failed", "no kernel")
    assert record["verdicts"][0]["passed"] is False


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, 64)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        assert not use_cache
        return self.linear(input_ids.float()[..., None].expand(-1, -1, 64))


@pytest.mark.parametrize("backend", bench_compile.BACKENDS)
def test_a_child_times_its_first_call_and_offloads_for_dak(
    backend: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    used: list[object] = []

    def compiled(self: torch.nn.Module, *, backend: object) -> None:
        used.append(backend)

    monkeypatch.setattr(bench_compile, "make_llama", lambda *_: Tiny().requires_grad_(False))
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert bench_compile.main(["--child", backend, "--cpu", "--tokens", "5", "--ratio", "0.5"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert used == [backend] and told["later_call_seconds"] > 0
    assert (told["remote_bytes"] > 0) == (backend == "dak")
    assert told["dynamo_seconds"] is None, "nothing was compiled"


def test_the_model_is_a_llama_of_the_size_asked_for() -> None:
    pytest.importorskip("transformers")
    asked = SimpleNamespace(hidden=64, layers=1)
    model = bench_compile.make_llama(asked, torch.device("cpu"))  # type: ignore[arg-type]
    assert model.lm_head.weight.shape == (32000, 64) and model.lm_head.weight.dtype == torch.float32
    assert len(model.model.layers) == 1 and not any(p.requires_grad for p in model.parameters())


def test_a_model_over_its_budget_generates_what_it_does_resident(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stages in this process, and no code generated: graphs run as they are rewritten."""
    pytest.importorskip("transformers")
    stages: list[str] = []

    def run_stage(stage: str, folder: Path, argv: list[str]) -> None:
        stages.append(stage)
        asked = [*argv, "--stage", stage, "--folder", str(folder)]
        assert generate_over_budget.main(asked) == 0

    def compiled(self: torch.nn.Module, *, backend: str, options: object) -> None:
        assert backend == "dak" and options is None

        def rewritten(graph: Any, inputs: Any) -> Any:
            return compile_graph(graph, inputs, BackendOptions(), lambda module, _: module.forward)

        self._compiled_call_impl = torch.compile(self._call_impl, backend=rewritten, dynamic=False)

    monkeypatch.setattr(generate_over_budget, "run_stage", run_stage)
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    status = generate_over_budget.main(
        ["--out", str(tmp_path), "--remote", "simulated", "--shape", "tiny", "--quick",
         "--layers", "1", "--prompt", "8", "--folder", str(tmp_path)]
    )  # fmt: skip
    record = json.loads((tmp_path / "over_budget.json").read_text())
    (row,) = record["cells"]
    assert status == 0 and stages == ["reference", "offloaded"]
    assert row["gpu_memory"] == round(0.6 * row["weight_bytes"])
    assert row["remote_bytes"] >= row["weight_bytes"] - row["gpu_memory"]
    assert row["identical"] == "2/2" and "90.4 kB in simulated" in row["explain"]
    card = record["verdicts"][-1]
    assert (card["passed"], card["note"]) == (None, "no GPU")


def test_a_stage_that_fails_ends_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fake_stage.py").write_text(
        "import sys\nprint(sys.argv[1:], file=sys.stderr)\nsys.exit(7 * ('offloaded' in sys.argv))"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate_over_budget, "MODULE", "fake_stage")
    generate_over_budget.run_stage("reference", tmp_path, ["--layers=1"])
    assert "--layers=1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="stage offloaded failed with status 7"):
        generate_over_budget.run_stage("offloaded", tmp_path, [])
