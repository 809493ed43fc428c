"""The README's commands, code and links are true, and the documentation names what the code has."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dak_inductor import errors

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines()]


def test_ci_runs_the_second_command() -> None:
    lines = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.strip()]
    assert lines[-1] == commands()[1]


def test_first_two_commands_are_the_set_up() -> None:
    demo, tests = commands()[:2]
    start = (
        "python3 -m venv .venv && . .venv/bin/activate && pip install torch==2.13.0 && pip install"
    )
    assert demo == f"{start} -e '.[demo]' && dak demo"
    assert tests == f"{start} -e '.[test]' && tests/check.sh"


@pytest.mark.parametrize("script", [".ci/run", "tests/check.sh"])
def test_scripts_can_be_run(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    assert "set -euo pipefail" in path.read_text()
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_check_script_fails_when_a_check_fails(tmp_path: Path) -> None:
    """With a `ruff` that fails in front of the real one, nothing later may hide it."""
    fake = tmp_path / "ruff"
    fake.write_text("#!/bin/sh\nexit 3\n")
    fake.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run([ROOT / "tests" / "check.sh"], env=environment, capture_output=True)
    assert ended.returncode == 3


@pytest.mark.slow
def test_generate_snippet_works_as_written(tmp_path: Path) -> None:
    code = blocks("python")[0]
    code += (
        "\nread = dak.stats().total"
        "\nassert tokens.shape == (3, 28), tokens.shape"
        "\nassert read.remote > 0 and read.local > 0, read\n"
    )
    script = tmp_path / "snippet.py"
    script.write_text(code)
    ended = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "LlamaForCausalLM" in ended.stdout


def test_plan_example_is_what_is_printed() -> None:
    """Up to numbers and blanks, which follow the profile, the cost model and the libraries."""
    shown = README.split("<!-- dak plan: begin -->")[1].split("<!-- dak plan: end -->")[0]
    command, *lines = shown.strip().strip("`").strip().splitlines()
    assert command.startswith("$ dak plan ")
    code = "from dak_inductor.cli import main; main()"
    arguments = [sys.executable, "-c", code, *command.split()[2:]]
    ended = subprocess.run(arguments, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert shape(ended.stdout.splitlines()) == shape(lines)


def shape(lines: list[str]) -> list[str]:
    """Words of each line: no numbers, units, rules or empty lines."""
    kept = [re.sub(r"[\d.,%:-]+|\b[kMG]?B\b|\b[mu]?s\b|─+", " ", line) for line in lines]
    return [" ".join(line.split()) for line in kept if line.split()]


def test_python_blocks_parse() -> None:
    for block in blocks("python"):
        ast.parse(block)


def anchors(page: Path) -> set[str]:
    """Those that a page's headings get where it is shown."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    heads = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target, place in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not place or place in anchors(linked), f"{target}#{place}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_blocks_are_those_of_the_repository(page: Path) -> None:
    """Scripts that are called are there, and so are the modules of `python -m`."""
    for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", page.read_text(), re.DOTALL):
        for script in re.findall(r"(?<![\w/.-])((?:tests|benchmarks)/[\w./-]+\.(?:py|sh))", block):
            assert (ROOT / script).is_file(), script
        for module in re.findall(r"python3? -m (dak_inductor[\w.]*)", block):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    pattern = r"`((?:dak_inductor|lowering|cuda_runtime|tests|benchmarks|docs)/[\w./-]+)`"
    for name in re.findall(pattern, page.read_text()):
        assert (ROOT / name).exists(), name


def test_every_error_has_a_section() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    named = {
        name
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.DakError)
    }
    assert set(re.findall(r"^## (\w+)$", page, flags=re.MULTILINE)) == named


def test_every_variable_is_documented() -> None:
    source = (ROOT / "dak_inductor" / "options.py").read_text()
    named = set(re.findall(r'environment\("(\w+)"\)', source)) | {"strategy", "plan"}
    page = (ROOT / "docs" / "options.md").read_text()
    assert {f"DAK_{name.upper()}" for name in named} == set(re.findall(r"`(DAK_\w+)`", page))


def test_only_one_module_reads_the_environment() -> None:
    readers = [
        str(path.relative_to(ROOT))
        for folder in ("dak_inductor", "lowering", "cuda_runtime")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if re.search(r"os\.(getenv|environ(\.get|\[))", path.read_text())
    ]
    # `loading` sets a switch of transformers for the time of a load
    assert set(readers) <= {"dak_inductor/options.py", "dak_inductor/loading.py"}
