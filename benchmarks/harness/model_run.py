"""Runs the cases of `dak bench` in worker processes and hands over each row as it comes.

A case that ends its worker, or outlasts its limit, is a row that says so; the next worker goes on.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

from dak_inductor.benchmarks.harness.model_case import Case
from dak_inductor.benchmarks.harness.model_worker import parse
from dak_inductor.report.model_table import LEFT_OUT

WORKER = (sys.executable, "-m", "dak_inductor.benchmarks.harness.model_worker")
FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds. No case begins after `begin`; none runs longer than `case`, nor past `end`."""

    begin: float = float("inf")
    end: float = float("inf")
    case: float = 900.0


@dataclass(frozen=True, slots=True)
class Listener:
    """Who hears of the run: cases as they begin, rows as they end, the ceilings once."""

    begun: Callable[[str], None]
    row: Callable[[dict[str, Any]], None]
    ceilings: Callable[[dict[str, Any]], None]


class ModelRun:
    """One run over `cases`. `log` takes what workers print, `environment` is added to theirs."""

    def __init__(
        self,
        cases: Sequence[Case],
        job: Mapping[str, Any],
        limits: Limits,
        listener: Listener,
        log: IO[str],
        *,
        worker: Sequence[str] = WORKER,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.waiting = list(cases)
        self.job = dict(job)
        self.limits, self.listener, self.log, self.worker = limits, listener, log, list(worker)
        self.environment = {**os.environ, **(environment or {})}
        self.begun = time.perf_counter()
        self._stopped = threading.Event()
        self._process: subprocess.Popen[str] | None = None

    def stop(self) -> None:
        """End from another thread: the worker is killed, and cases that wait get no row."""
        self._stopped.set()
        if self._process is not None:
            self._process.kill()

    def run(self) -> None:
        """Until every case has its row."""
        while self.waiting and not self._stopped.is_set():
            if self._elapsed() > self.limits.begin:
                self._leave_out()
                return
            before = len(self.waiting)
            ended = self._one_worker()
            late = self._elapsed() > self.limits.begin or self._stopped.is_set()
            if self.waiting and len(self.waiting) == before and not late:  # no case was begun
                self._row(FAILED, f"the worker did not begin: {ended}; see the log")

    def _one_worker(self) -> str:
        """Run waiting cases in one process until it ends. Returns how it did."""
        cases = [asdict(case) for case in self.waiting]
        job = {**self.job, "parent": os.getpid(), "cases": cases}
        process = subprocess.Popen(
            self.worker, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env=self.environment,
        )  # fmt: skip
        self._process = process
        if self._stopped.is_set():  # between the look and the start
            process.kill()
        assert process.stdin is not None and process.stdout is not None
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
        reader.start()
        try:
            try:
                process.stdin.write(json.dumps(job))
                process.stdin.close()
            except BrokenPipeError:  # it died at once; its status says more
                pass
            return self._listen(process, lines)
        finally:
            process.kill()
            process.wait()

    def _listen(self, process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> str:
        running, deadline = "", self._deadline()
        while True:
            try:
                line = lines.get(timeout=max(0.0, deadline - time.perf_counter()))
            except queue.Empty:
                late = self._elapsed() >= self.limits.end
                limit = f"{self.limits.end if late else self.limits.case:.0f} s"
                reason = f"stopped at the limit of the {'run' if late else 'case'}, {limit}"
                self._row(LEFT_OUT if late else FAILED, reason)
                return reason
            if line is None:
                status = process.wait()
                name = f"signal {-status}" if status < 0 else f"exit status {status}"
                if running and not self._stopped.is_set():
                    self._row(FAILED, f"the process ended with {name} in this case; see the log")
                return name
            event = parse(line)
            if event is None:
                self.log.write(line)
                self.log.flush()
            elif event["event"] == "ceilings":
                self.job["ceilings"] = event["ceilings"]
                self.listener.ceilings(event["ceilings"])
            elif event["event"] == "begin":
                if self._elapsed() > self.limits.begin:
                    return "time limit"
                running, deadline = event["case"], self._deadline()
                self.listener.begun(running)
            elif event["event"] == "row":
                running = ""
                self._take(event["row"])

    def _deadline(self) -> float:
        return min(time.perf_counter() + self.limits.case, self.begun + self.limits.end)

    def _elapsed(self) -> float:
        return time.perf_counter() - self.begun

    def _row(self, status: str, reason: str) -> None:
        """For the first waiting case, which is the one that ran: they run in order."""
        self._take({**self.waiting[0].fields(), "status": status, "reason": reason})

    def _take(self, row: dict[str, Any]) -> None:
        self.waiting = [case for case in self.waiting if case.key != row["case"]]
        self.listener.row(row)

    def _leave_out(self) -> None:
        while self.waiting:
            self._row(LEFT_OUT, "time limit: run again with --resume")


def _read(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)
