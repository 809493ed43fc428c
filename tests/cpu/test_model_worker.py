"""The worker of `dak bench`: events, rows of cases, ceilings that an earlier one measured."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from dak_inductor.benchmarks.harness import (
    ceilings,
    command_line,
    model_measure,
    model_prediction,
    model_worker,
)
from dak_inductor.benchmarks.harness.model_case import (
    DECODERS,
    MEASURED,
    PREDICTION,
    SIMULATION,
    Case,
)
from dak_inductor.benchmarks.harness.model_measure import Machine
from dak_inductor.benchmarks.harness.timing import QUICK, Timing
from dak_inductor.benchmarks.harness.yardstick import Ceilings

FOUND = Ceilings(1e12, 5e10, 5e10, 8e14, methods=(("link_copy", "one copy"),))


def case(figure: str, provider: str, model: str = "llama-3-8b") -> Case:
    return Case(figure, model, provider, 4, 1, 8, 4, 0.3)


def events(
    cases: list[Case],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    **job: Any,
) -> list[dict[str, Any]]:
    """What a worker says of a job; other lines than events are dropped."""
    asked = {"quick": True, "remote": "cpu", "ceilings": None, "host_memory": None,
             "seconds_per_phase": None, **job}  # fmt: skip
    asked["cases"] = [asdict(each) for each in cases]
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(asked)))
    assert model_worker.main() == 0
    found = [model_worker.parse(line + "\n") for line in capsys.readouterr().out.splitlines()]
    return [event for event in found if event is not None]


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> list[Machine]:
    """The machine of each case that ran; nothing is measured."""
    seen: list[Machine] = []

    def run(case: Case, machine: Machine) -> dict[str, object]:
        seen.append(machine)
        print("a library speaks")
        return {"status": "ok", "error": float("inf")}

    monkeypatch.setattr(model_measure, "run_case", run)
    return seen


def test_each_case_begins_and_ends_with_an_event(
    machines: list[Machine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [case(SIMULATION, "dak"), case(SIMULATION, "split eager")]
    found = events(cases, monkeypatch, capsys)
    assert [event["event"] for event in found] == ["begin", "row", "begin", "row", "end"]
    row = found[1]["row"]
    assert (row["case"], row["status"], row["model_layers"]) == (cases[0].key, "ok", 32)
    assert row["error"] == "inf", "JSON has no word for it"
    first, second = machines
    assert first is second and first.ceilings is None and first.caches is None


def test_a_worker_whose_capture_failed_leaves_the_rest_to_another(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(case: Case, machine: Machine) -> dict[str, object]:
        machine.spoiled = case.provider == "split eager"
        return {"status": "ok"}

    monkeypatch.setattr(model_measure, "run_case", run)
    cases = [case(SIMULATION, name) for name in ("dak", "split eager", "resident eager")]
    found = events(cases, monkeypatch, capsys)
    assert [event["event"] for event in found] == ["begin", "row", "begin", "row"]


def test_a_failed_capture_is_told_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(step: Any) -> Any:
        raise RuntimeError("a read of device memory")

    monkeypatch.setattr(model_measure, "capture", fail)
    for name in ("current_stream", "set_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    machine = Machine(torch.device("cuda", 0), FOUND, QUICK)
    hooked = SimpleNamespace(step=lambda: None, graph=False)
    assert model_measure._captured(cast(Any, hooked), machine)[1] == "calls"
    assert not machine.spoiled
    prepared = SimpleNamespace(step=lambda: None, graph=True)
    step, method = model_measure._captured(cast(Any, prepared), machine)
    assert step is prepared.step and "RuntimeError: a read of device memory" in method
    assert machine.spoiled


@pytest.mark.parametrize(("graph", "calls", "methods"), [
    (True, True, ["CUDA graph replays", "calls"]),
    (True, False, ["CUDA graph replays"]),
    (False, True, ["calls"]),
    (False, False, ["calls"]),
])  # fmt: skip
def test_a_first_token_is_timed_replayed_and_in_calls(
    monkeypatch: pytest.MonkeyPatch, graph: bool, calls: bool, methods: list[str]
) -> None:
    made: list[tuple[Any, str]] = []

    def timed(steps: Any, *, device: Any, rule: Any, method: str) -> Timing:
        made.append((*steps, method))
        return Timing(1.0, (1.0,), 1, method)

    monkeypatch.setattr(model_measure, "capture", lambda step: "the graph")
    monkeypatch.setattr(model_measure, "time_calls", timed)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: None)
    machine = Machine(torch.device("cuda", 0), FOUND, QUICK)
    prepared = SimpleNamespace(step="the call", graph=graph)
    found = model_measure._timings(cast(Any, prepared), machine, calls=calls)
    assert [each.method for each in found] == [how for _, how in made] == methods
    assert [what for what, _ in made] == [
        "the call" if how == "calls" else "the graph" for how in methods
    ]


@pytest.mark.parametrize("model", DECODERS)
def test_no_decode_step_reads_device_memory_from_the_host(model: str) -> None:
    """No capture allows that, and a graph without breaks has none."""
    small = Case(SIMULATION, model, "dak", 2, 2, 8, 4, 0.3)
    whole = model_measure.build(small, torch.device("cpu"))
    inputs = whole.phase_inputs(batch=2, prompt=8, seed=1)
    compiled = torch.compile(whole, backend="eager", fullgraph=True)
    for phase in inputs.tensors:
        inputs.phase = phase
        torch.testing.assert_close(compiled(*inputs.arguments()), whole(*inputs.arguments()))


def test_a_model_that_cannot_be_planned_is_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def row(self: Any, case: Case) -> dict[str, object]:
        if case.model == "opt-30b":
            raise RuntimeError("cannot be traced")
        return {"status": "ok", "kind": "prediction"}

    monkeypatch.setattr(model_prediction.Predictor, "row", row)
    cases = [case(PREDICTION, "dak plan", "opt-30b"), case(PREDICTION, "dak plan")]
    rows = [e["row"] for e in events(cases, monkeypatch, capsys) if e["event"] == "row"]
    assert [each["status"] for each in rows] == ["failed", "ok"]
    assert rows[0]["reason"] == "RuntimeError: cannot be traced"


def test_ceilings_are_measured_once_and_handed_on(
    machines: list[Machine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[tuple[object, ...]] = []

    def measure(*asked: object, host_memory: int | None) -> Ceilings:
        measured.append((*asked, host_memory))
        return FOUND

    monkeypatch.setattr(command_line, "default_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(ceilings, "measure", measure)
    cases = [case(MEASURED, "dak"), case(MEASURED, "split eager")]
    found = events(cases, monkeypatch, capsys, host_memory=10**9)
    (told,) = [event["ceilings"] for event in found if event["event"] == "ceilings"]
    assert measured == [(torch.device("cuda", 0), "cpu", QUICK, 10**9)]
    events(cases, monkeypatch, capsys, ceilings=told, quick=False)
    events(cases[:1], monkeypatch, capsys, ceilings=told, quick=False, seconds_per_phase=1.5)
    assert len(measured) == 1, "those of the worker before are taken over"
    assert [machine.ceilings for machine in machines] == [FOUND] * 5
    first, second, third, fourth, _ = (machine.caches for machine in machines)
    assert first is second is None and third is fourth is not None
    assert [machine.rule.target_seconds for machine in machines] == [0.3, 0.3, 0.6, 0.6, 1.5]


def test_lines_that_are_no_events_are_left_alone() -> None:
    assert model_worker.parse("a library speaks\n") is None
    assert model_worker.parse(model_worker.MARK + '{"event": "ro') is None, "cut off"
    assert model_worker.parse(model_worker.MARK + "[1]") is None


_RUN = """
import os, time
from dak_inductor.benchmarks.harness.model_worker import end_with_parent
if not os.fork():
    end_with_parent()
    print("worker", flush=True)
time.sleep(60)
"""


def test_a_worker_ends_with_a_run_that_is_killed() -> None:
    command = [sys.executable, "-c", _RUN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and run.stdout.readline() == "worker\n"
        begun = time.perf_counter()
        run.kill()
        assert run.stdout.read() == ""  # ends when nobody holds it, the worker neither
    assert time.perf_counter() - begun < 30


def test_a_worker_whose_run_has_ended_begins_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], machines: list[Machine]
) -> None:
    asked = [case(SIMULATION, "dak")]
    assert events(asked, monkeypatch, capsys, parent=os.getppid() + 1) == []
    assert machines == []
