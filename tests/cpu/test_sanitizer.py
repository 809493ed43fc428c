"""Scripts that start themselves under compute-sanitizer, and kernels compiled ahead by many."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dak_inductor.benchmarks.harness import compile_ahead, sanitizer
from dak_inductor.cuda_runtime import nvrtc


def test_a_script_runs_under_the_tool_and_returns_its_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = sanitizer.parser("calls").parse_args(
        ["--tool", "memcheck", "--tool-options", "--a 'b c'"]
    )
    monkeypatch.setattr(shutil, "which", lambda name, path: f"/tools/{name}")
    ran: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], *, env: dict[str, str], check: bool) -> Any:
        ran.append((command, env))
        return SimpleNamespace(returncode=sanitizer.FOUND_ERRORS)

    monkeypatch.setattr(subprocess, "run", run)
    script = ["calls.py", "--remote", asked.remote]
    status = sanitizer.run_under(asked.tool, script, tool_options=asked.tool_options)
    assert status == sanitizer.FOUND_ERRORS, "what the tool found fails the script"
    ((command, environment),) = ran
    assert command[:3] == ["/tools/compute-sanitizer", "--tool", "memcheck"]
    assert command[-6:] == ["--a", "b c", sys.executable, "calls.py", "--remote", "cpu"]
    assert command[command.index("--error-exitcode") + 1] == str(sanitizer.FOUND_ERRORS)
    assert environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert "compute-sanitizer --tool memcheck" in capsys.readouterr().out


def test_the_installed_package_comes_before_the_toolkit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "nvidia" / "cu13" / "bin"
    folder.mkdir(parents=True)
    (folder / "compute-sanitizer").touch(mode=0o700)
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(sanitizer.importlib.util, "find_spec", lambda name: found)
    ran: list[str] = []

    def run(command: list[str], **options: Any) -> Any:
        ran.append(command[0])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    assert sanitizer.run_under("racecheck", ["calls.py"]) == 0
    assert ran == [str(folder / "compute-sanitizer")]


def test_without_the_tool_nothing_passes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path: None)
    assert sanitizer.run_under("racecheck", ["calls.py"]) == 2
    assert "neither in PATH nor in" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sanitizer.parser("calls").parse_args(["--tool", "guesscheck"])


def test_calls_are_made_one_by_one_until_one_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    def calls() -> Any:
        yield "first"
        raise AssertionError("second is wrong")

    with pytest.raises(AssertionError, match="second"):
        sanitizer.report(calls())
    assert capsys.readouterr().out == "ok first\n"
    assert sanitizer.report(["only"]) == 0


def test_each_instance_is_compiled_by_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from dak_inductor.lowering.attention import instances as attention
    from dak_inductor.lowering.linear import instances as linear

    compiled: list[Any] = []
    fake = SimpleNamespace(cubin=lambda kernel, *, architecture: compiled.append(kernel))
    monkeypatch.setattr(nvrtc, "compiler", lambda: fake)
    counts = [compile_ahead.compile_part(part, 3) for part in range(3)]
    assert compile_ahead.main(["0", "1000"]) == 0
    wanted = [*linear.all_instances(), *attention.all_instances()]
    assert sum(counts) == len(wanted) and max(counts) - min(counts) <= 1
    assert compiled.pop() == wanted[0], "of a thousand parts the first has one"
    assert {repr(kernel) for kernel in compiled} == {repr(kernel) for kernel in wanted}


def test_a_part_that_fails_fails_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str]) -> None:
            self.args, self.returncode = command, int(command[-2] == "1")
            started.append(command[-3:])

        def wait(self) -> int:
            return self.returncode

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(compile_ahead.os, "cpu_count", lambda: 1)
    assert compile_ahead.main([]) == 0
    with pytest.raises(subprocess.CalledProcessError):
        compile_ahead.compile_ahead(processes=2)
    module = compile_ahead.MODULE
    assert started == [[module, "0", "1"], [module, "0", "2"], [module, "1", "2"]]
