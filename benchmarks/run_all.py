"""Runs the chosen suites, each in a process with a time limit, and prints one short table last.

Writes one JSON record per suite and one log to the output folder; installs nothing. The exit
status is 0 only if every suite ran and no bar was missed.

    python benchmarks/run_all.py --out DIR [--suites decode_step,move,load] [--quick]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from dak_inductor.benchmarks.harness import command_line
from dak_inductor.benchmarks.harness.record import Verdict
from dak_inductor.benchmarks.harness.table import table, verdict_rows

COLUMNS = ("suite", "what", "measured", "bar", "unit", "verdict", "note")


@dataclass(frozen=True, slots=True)
class Suite:
    """A benchmark module, the record it writes, its own arguments and its time limit in seconds.

    `alone`: it takes the path of its record as `--out` and none of the shared options.
    """

    module: str
    record: str
    arguments: tuple[str, ...] = ()
    limit: int = 300
    alone: bool = False


SUITES: Mapping[str, Suite] = {
    "move": Suite("bench_move", "move", limit=120),
    "decode_step": Suite("bench_step", "decode_step", limit=420),
    "marks": Suite("bench_marks", "marks", limit=240),
    "host": Suite("bench_host", "host", limit=120),
    "load": Suite("bench_load", "load", limit=240),
    "pages": Suite("bench_pages", "pages", limit=300),
    "over_budget": Suite("generate_over_budget", "over_budget", limit=420),
    "compile": Suite("bench_compile", "compile", limit=540),
    "compile_cpu": Suite("bench_compile", "compile_cpu", ("--cpu",), limit=900),
    "linear": Suite("bench_linear", "linear", ("--limit-seconds", "480"), limit=560),
    "attention": Suite("bench_attention", "attention", ("--limit-seconds", "480"), limit=560),
    "long_context": Suite("bench_long_context", "long_context", limit=300),
    "window": Suite("bench_window", "window", limit=120),
    "fillers": Suite("bench_fillers", "fillers", limit=120),
    "replan": Suite("bench_replan", "replan", limit=120),
    "planner": Suite("bench_planner", "planner", limit=900, alone=True),
}
DEFAULT = ("move", "decode_step", "load", "over_budget", "compile")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = command_line.parser("Every benchmark, one table")
    made.add_argument("--suites", default=",".join(DEFAULT), help=f"among {', '.join(SUITES)}")
    made.add_argument("--limit-scale", type=float, default=1.0, help="stretches the time limits")
    return made.parse_args(argv)


def chosen(suites: str) -> list[str]:
    """Names from `--suites`; an unknown one is an error that lists those there are."""
    names = [name.strip() for name in suites.split(",") if name.strip()]
    unknown = [name for name in names if name not in SUITES]
    if unknown or not names:
        raise SystemExit(f"unknown suites {unknown or suites!r}; there are {list(SUITES)}")
    return names


def command(suite: Suite, arguments: argparse.Namespace) -> list[str]:
    """The suite's own command line with the shared options passed on."""
    made = [sys.executable, "-m", f"dak_inductor.benchmarks.{suite.module}", *suite.arguments]
    if suite.alone:
        return [*made, "--out", str(arguments.out / f"{suite.record}.json")]
    made += ["--out", str(arguments.out), "--remote", arguments.remote]
    made += ["--quick"] if arguments.quick else []
    made += ["--host-memory", str(arguments.host_memory)] if arguments.host_memory else []
    made += ["--commit", arguments.commit] if arguments.commit else []
    return made


def run_suite(name: str, arguments: argparse.Namespace, log: TextIO) -> tuple[str, float]:
    """Run one suite into the log. Returns what went wrong ('' for nothing) and its seconds."""
    suite = SUITES[name]
    (arguments.out / f"{suite.record}.json").unlink(
        missing_ok=True
    )  # no stale record passes for new
    limit = suite.limit * arguments.limit_scale
    line = command(suite, arguments)
    log.write(f"\n$ {' '.join(line)}\n")
    log.flush()
    begun = time.perf_counter()
    try:
        done = subprocess.run(line, stdout=log, stderr=subprocess.STDOUT, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"stopped after its limit of {limit:.0f} s", limit
    # status 1 is a missed bar, which the record tells better
    problem = "" if done.returncode in (0, 1) else f"exit status {done.returncode}"
    return problem, time.perf_counter() - begun


def rows_of(name: str, problem: str, seconds: float, out: Path) -> list[dict[str, object]]:
    """Rows of the last table: the record's verdicts, or one row that says why there is no
    record."""
    path = out / f"{SUITES[name].record}.json"
    if not path.is_file():
        reason = problem or "left no record"
        note = f"{reason}; see run_all.log"
        return [{"suite": name, "what": "did not finish", "verdict": "MISS", "note": note}]
    record = json.loads(path.read_text(encoding="utf-8"))
    if SUITES[name].alone:
        verdicts = [
            Verdict(bar, float(met), 1.0, "met", met) for bar, met in record["bars"].items()
        ]
    else:
        verdicts = [Verdict(**fields) for fields in record["verdicts"]]
    rows = [{"suite": name, **row} for row in verdict_rows(verdicts)]
    if problem:
        rows.append({"suite": name, "what": "process", "verdict": "MISS", "note": problem})
    rows.append({"suite": name, "what": "took", "measured": seconds, "unit": "s", "verdict": ""})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    names = chosen(arguments.suites)
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    with (arguments.out / "run_all.log").open("w", encoding="utf-8") as log:
        for name in names:
            print(f"running {name} ...", file=sys.stderr, flush=True)
            problem, seconds = run_suite(name, arguments, log)
            rows += rows_of(name, problem, seconds, arguments.out)
    print(table(rows, COLUMNS), flush=True)
    return int(any(row["verdict"] == "MISS" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
