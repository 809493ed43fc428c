"""The process in which cases of `dak bench` run: a job on standard input, events as lines.

    python -m dak_inductor.benchmarks.harness.model_worker < job.json

A crash or a hang costs the case that was running; the parent starts another worker with the rest. A
parent that is killed takes its worker along: left alone, that would go on to hold the card for the
rest of its case, beside the run that resumes.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

MARK = "@dak-bench "
"""Begins each event's line; other lines are what libraries print."""
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_SECONDS_PER_PHASE = 0.6
"""To measure prefill, and to measure decode, of a row, at most where nothing is asked. In
`models_quick.json` repeats of decode of 0.1 s agree within 1%, but for accelerate's."""


def emit(**event: object) -> None:
    """One event as a line. Values that JSON has no word for become texts."""
    from dak_inductor.benchmarks.harness.record import plain

    print(MARK + json.dumps(plain(event), allow_nan=False), flush=True)


def parse(line: str) -> dict[str, Any] | None:
    """The event of a line; None for a line that is none."""
    if not line.startswith(MARK):
        return None
    try:
        event = json.loads(line.removeprefix(MARK))
    except ValueError:  # cut off where the worker died
        return None
    return event if isinstance(event, dict) else None


def end_with_parent() -> None:
    """Have the kernel kill this process with the one that started it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    job = json.load(sys.stdin)
    if os.getppid() != job.get("parent", os.getppid()):  # killed before `end_with_parent`
        return 0
    from dak_inductor.benchmarks.harness.model_case import PREDICTION, Case
    from dak_inductor.benchmarks.harness.model_prediction import Predictor

    cases = [Case(**fields) for fields in job["cases"]]
    machine: Any = None
    predictor = Predictor()
    for case in cases:
        emit(event="begin", case=case.key)
        if case.figure == PREDICTION:
            row = _predicted(predictor, case)
        else:
            from dak_inductor.benchmarks.harness.model_measure import run_case

            machine = machine or _machine(job)
            row = run_case(case, machine)
        emit(event="row", case=case.key, row={**case.fields(), **row})
        if machine is not None and machine.spoiled:
            return 0  # another process runs the rest
    emit(event="end")
    return 0


def _machine(job: Mapping[str, Any]) -> Any:
    """Device and ceilings; those of an earlier worker of the run are taken over."""
    from dak_inductor.benchmarks.harness import ceilings, command_line
    from dak_inductor.benchmarks.harness.compile_caches import CompileCaches
    from dak_inductor.benchmarks.harness.model_measure import Machine
    from dak_inductor.benchmarks.harness.timing import QUICK, TimingRule
    from dak_inductor.benchmarks.harness.yardstick import Ceilings

    device = command_line.default_device()
    caches = None if job["quick"] else CompileCaches()
    careful = QUICK if job["quick"] else TimingRule()
    usual = min(careful.target_seconds, _SECONDS_PER_PHASE)
    rule = replace(careful, target_seconds=job["seconds_per_phase"] or usual)
    if device.type != "cuda":
        return Machine(device, None, TimingRule(0.05, 3, 1), caches=caches)
    known = job["ceilings"]
    if known is not None:
        found = Ceilings(**{**known, "methods": tuple(known["methods"].items())})
    else:
        found = ceilings.measure(device, job["remote"], careful, host_memory=job["host_memory"])
        emit(event="ceilings", ceilings=found.as_dict())
    return Machine(device, found, rule, job["host_memory"], caches)


def _predicted(predictor: Any, case: Any) -> dict[str, object]:
    try:
        return dict(predictor.row(case))
    except Exception as error:  # a model that cannot be traced is a row
        reason = f"{type(error).__name__}: {str(error)[:400]}"
        return {"status": "failed", "kind": "prediction", "reason": reason}


if __name__ == "__main__":
    end_with_parent()
    raise SystemExit(main())
