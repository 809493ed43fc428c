"""The command `dak`: output, exit codes, errors as one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dak_inductor import plan_command
from dak_inductor.cli import ERROR_EXIT_CODE, app
from dak_inductor.errors import OptionError
from dak_inductor.plan import OpUse, Plan

runner = CliRunner()
CONFIG = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 4096,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 4096,
    "dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small config, with synthetic graphs instead of traced ones."""

    def graphs(model: Any, *, batch: int, prompt: int, new: int) -> tuple[list[OpUse], list[Any]]:
        return [
            OpUse(name, graph, entry, "linear", 1e6, 1e5, 1e6 * batch, 1.0, module=entry, m=batch)
            for graph in ("prefill", "decode")
            for name, entry in plan_command.entry_names(model).items()
        ], []

    monkeypatch.setattr(plan_command, "graphs_for", graphs)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def test_version() -> None:
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0 and result.stdout.startswith("dak-inductor ")


def test_help_names_the_commands() -> None:
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("probe", "plan", "demo"):
        assert command in result.stdout


def test_plan_prints_a_table_and_the_predictions(model: str) -> None:
    result = runner.invoke(app, ["plan", "--model", model, "--gpu-memory", "612MB"])
    assert result.exit_code == 0, result.stderr
    for wanted in (
        "TTFT",
        "TPOT",
        "KV cache",
        "remote memory needed",
        "model.layers.*.mlp.up_proj",
    ):
        assert wanted in result.stdout


def test_all_shows_every_layer(model: str) -> None:
    result = runner.invoke(app, ["plan", "--model", model, "--gpu-memory", "612MB", "--all"])
    assert result.exit_code == 0
    assert "model.layers.1.mlp" in result.stdout and "layers.*" not in result.stdout


def test_json_is_the_only_thing_on_stdout(model: str, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    result = runner.invoke(
        app, ["plan", "--model", model, "--gpu-memory", "612MB", "--json", "--out", str(out)]
    )
    record = json.loads(result.stdout)
    assert record["tpot"] > 0 and record["memory"]["remote"] > 0
    plan = Plan.from_json(out.read_text())
    assert plan.remote_bytes == record["memory"]["remote"]
    assert Plan.from_json(json.dumps(record["plan"])) == plan


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--gpu-memory", "lots"], "BudgetError"),
        (["--gpu-memory", "601MB", "--batch", "64"], "BudgetError"),
        (["--hardware", "abacus"], "ProfileError"),
        (["--remote", "moon"], "ProfileError"),
        (["--out", "/no/such/folder/plan.json"], "OptionError"),
    ],
)
def test_named_errors_are_one_line_and_exit_code_2(
    model: str, arguments: list[str], name: str
) -> None:
    result = runner.invoke(app, ["plan", "--model", model, *arguments])
    assert result.exit_code == ERROR_EXIT_CODE
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"dak: {name}: ")


def test_an_unknown_model_is_one_line() -> None:
    result = runner.invoke(app, ["plan", "--model", "llama-9"])
    assert result.exit_code == ERROR_EXIT_CODE and result.stderr.startswith("dak: OptionError: ")


def test_debug_shows_the_traceback() -> None:
    result = runner.invoke(app, ["--debug", "plan", "--model", "llama-9"])
    assert isinstance(result.exception, OptionError)


def test_probe_without_a_gpu_is_a_named_error() -> None:
    result = runner.invoke(app, ["probe"])
    assert result.exit_code == ERROR_EXIT_CODE
    assert result.stderr.startswith("dak: ") and result.stderr.count("\n") == 1


def test_demo_hands_its_options_over(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def run(**options: Any) -> int:
        seen.update(options)
        return 1

    monkeypatch.setattr("dak_inductor.demo.run", run)
    result = runner.invoke(
        app, ["demo", "--layers", "3", "--ratio", "0.25", "--remote", "simulated", "--json", "x"]
    )
    assert result.exit_code == 1
    assert (seen["layers"], seen["ratio"], seen["remote"]) == (3, 0.25, "simulated")
    assert seen["json_out"] == Path("x")


def test_the_command_line_starts_without_transformers() -> None:
    code = "import sys, dak_inductor.cli; print('transformers' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
