"""What looking costs a decode step: NVTX ranges, and counts by kernels of their own.

Bar: 0.5% of the step each. Measured on the same offloaded model, a block with and a block without
in turn: NVTX ranges around calls from the host, where they are made at each call, and around a
capture, whose replays make none; and replays of graphs captured with and without the small kernels
that count for stock ones. What our kernels count themselves cannot be taken out, and is in all.
Calls differ by more than the bar, so the ranges of a call are timed alone too.

One graph that was captured with ranges took 2.5% longer than one without, on an H200: captures of
the same work differ by more than the bar. So all is captured anew in each of some rounds, in all
orders, and the median of the rounds counts. How sure it is, is in its 95% confidence interval.

    python benchmarks/bench_marks.py --out DIR [--layers 8] [--fraction 0.1]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from dak_inductor.benchmarks.harness import command_line, step_options
from dak_inductor.benchmarks.harness.peers.dak_backend import DakBackend
from dak_inductor.benchmarks.harness.record import Verdict, make_record
from dak_inductor.benchmarks.harness.timing import (
    CapturedStep,
    Step,
    TimingRule,
    capture,
    time_in_turn,
)
from dak_inductor.errors import OptionError
from dak_inductor.lowering import reads
from dak_inductor.lowering.marks import MARKS

BAR = 0.005
REPEATS = 61
"""Blocks of calls: beside other work on the machine one differs from the next by some percent."""
ROUNDS = 48
"""Of captures: each of the six orders eight times."""
ROUND_SECONDS = 0.4
"""Of replays of one capture: captures of the same work differ by more than replays of one do."""
SEED = 202
COLUMNS = (
    "what", "with_milliseconds", "without_milliseconds", "cost", "lowest", "highest", "method",
)  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = command_line.parser(__doc__.splitlines()[0] if __doc__ else "")
    step_options.add(made)
    made.add_argument("--fraction", type=float, default=0.1)
    made.add_argument("--rounds", type=int, default=None, help="of captures")
    return step_options.parse(made, argv)


def marked(step: Step, on: bool) -> Step:
    """The step with or without ranges, whatever was before."""

    def run() -> object:
        if MARKS.nvtx is not on:
            MARKS.switch(on)
        return step()

    return run


def row_of(
    what: str, looking: Sequence[float], plain: Sequence[float], method: str
) -> dict[str, object]:
    """From seconds of both, taken in turn. The cost is the median one, which lies between `lowest`
    and `highest` with a confidence of 95%."""
    costs = sorted(a / b - 1 for a, b in zip(looking, plain, strict=True))
    edge = confidence_edge(len(costs))
    return {
        "what": what,
        "with_milliseconds": statistics.median(looking) * 1e3,
        "without_milliseconds": statistics.median(plain) * 1e3,
        "cost": statistics.median(costs),
        "lowest": costs[edge],
        "highest": costs[-1 - edge],
        "method": method,
    }


def marks_of(step: Step) -> list[str]:
    """The texts of all marks that a call makes, in order."""
    seen: list[str] = []

    def maker(text: str) -> AbstractContextManager[None]:
        seen.append(text)
        return nullcontext()

    with MARKS.recorded(maker):
        step()
    return seen


def reckoned_row(marks: Sequence[str], plain: float) -> dict[str, object]:
    """What the ranges of a call take the host, by themselves: the bar is a twentieth of what calls
    differ by. `plain`: seconds of a call without them."""
    MARKS.switch(True)
    took = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        for text in marks:
            with MARKS.ready(text):
                pass
        took.append(time.perf_counter() - begun)
    return row_of(
        "ranges, calls, alone",
        [plain + each for each in took],
        [plain] * len(took),
        f"{len(marks)} ranges around nothing",
    )


def confidence_edge(count: int, doubt: float = 0.05) -> int:
    """How many of `count` sorted values lie outside of the median's confidence interval at each
    end: as many as are seldom all on one side of it."""
    seldom = itertools.accumulate(math.comb(count, k) / 2**count for k in range(count))
    return max(0, sum(chance <= doubt / 2 for chance in seldom) - 1)


def captured(kind: str, step: Step) -> CapturedStep:
    """A graph with ranges ("named"), without ("plain"), or without ranges and counts ("quiet")."""
    if kind != "quiet":
        return capture(marked(step, kind == "named"))
    with reads.uncounted():
        return capture(marked(step, False))


def replay_seconds(
    step: Step, device: torch.device, rule: TimingRule, rounds: int
) -> Mapping[str, list[float]]:
    """Seconds of replays by kind, one of each round."""
    seconds: dict[str, list[float]] = {"named": [], "plain": [], "quiet": []}
    rule = dataclasses.replace(rule, target_seconds=min(ROUND_SECONDS, rule.target_seconds))
    orders = itertools.cycle(itertools.permutations(seconds))
    for order in itertools.islice(orders, rounds):
        graphs = [captured(kind, step) for kind in order]
        for kind, timing in zip(order, time_in_turn(graphs, device=device, rule=rule), strict=True):
            seconds[kind].append(timing.seconds)
        del graphs  # before the next round's take memory
    return seconds


def rows_of(
    step: Step, device: torch.device, rule: TimingRule, rounds: int
) -> list[dict[str, object]]:
    """All pairs that this machine has."""
    before = MARKS.nvtx
    try:
        calls = (marked(step, True), marked(step, False))
        blocks = dataclasses.replace(rule, repeats=REPEATS)
        looking, plain = time_in_turn(calls, device=device, rule=blocks)
        rows = [row_of("ranges, calls", looking.repeats, plain.repeats, "calls from the host")]
        marks = marks_of(step)
        if marks:
            rows.append(reckoned_row(marks, plain.seconds))
        if device.type == "cuda":
            made = replay_seconds(step, device, rule, rounds)
            method = f"{rounds} rounds of CUDA graphs"
            rows += [
                row_of("ranges, replays", made["named"], made["plain"], method),
                row_of("counts, replays", made["plain"], made["quiet"], method),
            ]
        return rows
    finally:
        MARKS.switch(before)


def verdicts(rows: Sequence[dict[str, object]], *, on_gpu: bool) -> list[Verdict]:
    """The cost of each. Nothing is decided without a GPU, nor where the cost is above the bar and
    not surely so."""
    made = []
    for row in rows:
        cost, lowest, highest = (float(str(row[name])) for name in ("cost", "lowest", "highest"))
        passed = True if cost <= BAR else False if lowest > BAR else None
        note = f"95% confidence: {lowest:.2%} to {highest:.2%}"
        if not on_gpu:
            passed, note = None, "no GPU"
        made.append(Verdict(str(row["what"]), cost, BAR, "share", passed, note))
    return made


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    device = command_line.default_device()
    rule = command_line.timing_rule(arguments)
    rounds = arguments.rounds or (6 if arguments.quick else ROUNDS)
    setting = step_options.setting_of(arguments, device, arguments.fraction)
    workload = setting.workload
    rows: list[dict[str, object]] = []
    notes = ["the counters inside our kernels are in every time"]
    with torch.no_grad():
        inputs = workload.inputs(device, SEED)
        prepared = DakBackend().prepare(workload.build(device), inputs, setting)
        try:
            rows = rows_of(prepared.step, device, rule, rounds)
        except OptionError as error:
            notes.append(str(error))
        finally:
            prepared.close()
    record = make_record(
        "marks",
        arguments=command_line.arguments_dict(arguments),
        cells=rows,
        verdicts=verdicts(rows, on_gpu=device.type == "cuda"),
        notes=notes,
        commit=arguments.commit,
    )
    return command_line.finish(record, COLUMNS, arguments.out)


if __name__ == "__main__":
    raise SystemExit(main())
