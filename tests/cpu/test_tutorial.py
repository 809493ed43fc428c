"""The tutorial's commands and options exist, its code runs, and every command is documented."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import typer.main

from dak_inductor.cli import app
from dak_inductor.options import BackendOptions

ROOT = Path(__file__).resolve().parents[2]
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TUTORIAL, flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page: Path) -> None:
    lines = re.findall(r"\bdak (\w+)((?: [^\n`&]*)?)", page.read_text())
    for name, rest in lines:
        if name in COMMANDS:
            known = {option for p in COMMANDS[name].params for option in p.opts}
            asked = set(re.findall(r"(?<![\w-])--[\w-]+", rest))
            assert asked <= known | {"--help"}, f"dak {name}{rest}"


def test_every_command_has_a_row_in_the_options_page() -> None:
    page = (ROOT / "docs" / "options.md").read_text()
    assert {f"dak {name}" for name in COMMANDS} == set(
        re.findall(r"^\| `(dak \w+)` \|", page, re.M)
    )


def test_options_of_bench_are_documented() -> None:
    page = (ROOT / "docs" / "options.md").read_text().split("### `dak bench`")[1]
    options = {option for p in COMMANDS["bench"].params for option in p.opts}
    missing = {option for option in options if f"`{option}`" not in page}
    assert missing <= {"--commit", "--help"}, missing


def test_python_of_the_tutorial_parses() -> None:
    assert len(blocks("python")) == 2
    for block in blocks("python"):
        ast.parse(block)


def test_code_of_the_tutorial_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the compiler, which the README's snippet, of the same calls, is tested with."""
    monkeypatch.chdir(tmp_path)
    with torch.compiler.set_stance("force_eager"):
        exec("\n".join(blocks("python")), {})
    assert (tmp_path / "mine" / "config.json").is_file()
    assert "self_attn.q_proj" in (tmp_path / "explain.html").read_text()
    assert "traceEvents" in (tmp_path / "measured.json").read_text()


def test_every_option_of_the_backend_has_a_row() -> None:
    section = (ROOT / "docs" / "options.md").read_text().split("## The backend")[1]
    rows = re.findall(r"^\| `(\w+)` \|", section.split("\n### ")[0], re.M)
    assert set(rows) == {field.name for field in fields(BackendOptions)} | {"mode"}


def test_help_of_bench_lists_the_models() -> None:
    from dak_inductor.benchmarks.harness.model_case import MODELS

    option = next(p for p in COMMANDS["bench"].params if "--models" in p.opts)
    assert option.help == f"Comma-separated, among {', '.join(MODELS)}. Default: all."


def test_models_of_bench_are_those_of_the_options_page() -> None:
    from dak_inductor.benchmarks.harness.model_case import MODELS

    page = (ROOT / "docs" / "options.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| `--models` |"))
    assert tuple(re.findall(r"`([a-z][^`]*)`", row)) == MODELS
