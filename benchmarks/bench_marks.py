"""What looking costs a decode step: NVTX ranges, and counts by kernels of their own.

Bar: 0.5% of the step each. Measured on the same offloaded model, a block with and a block without
in turn: NVTX ranges around calls from the host, where they are made at each call, and around a
capture, whose replays make none; and replays of graphs captured with and without the small kernels
that count for stock ones. What our kernels count themselves cannot be taken out, and is in all.

    python benchmarks/bench_marks.py --out DIR [--layers 8] [--fraction 0.1]
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from dak_inductor.benchmarks.harness import command_line
from dak_inductor.benchmarks.harness.models import LLAMA3_8B, TINY, Workload
from dak_inductor.benchmarks.harness.peers.dak_backend import DakBackend
from dak_inductor.benchmarks.harness.peers.provider import Setting
from dak_inductor.benchmarks.harness.record import Verdict, make_record
from dak_inductor.benchmarks.harness.timing import Step, TimingRule, capture, time_in_turn
from dak_inductor.errors import OptionError
from dak_inductor.lowering import reads
from dak_inductor.lowering.marks import MARKS

BAR = 0.005
REPEATS = 15
"""Blocks of each: one differs from the next by some tenths of a percent."""
SEED = 202
COLUMNS = ("what", "with_milliseconds", "without_milliseconds", "cost", "spread", "method")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = command_line.parser(__doc__.splitlines()[0] if __doc__ else "")
    made.add_argument("--layers", type=int, default=8)
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--context", type=int, default=512)
    made.add_argument("--fraction", type=float, default=0.1)
    made.add_argument(
        "--shape", choices=("llama3-8b", "tiny"), default=command_line.default_shape()
    )
    return made.parse_args(argv)


def marked(step: Step, on: bool) -> Step:
    """The step with or without ranges, whatever was before."""

    def run() -> object:
        if MARKS.nvtx is not on:
            MARKS.switch(on)
        return step()

    return run


@contextmanager
def uncounted() -> Iterator[None]:
    """Nothing is counted by a kernel of its own."""
    count = reads.count_on_device
    reads.count_on_device = lambda *_: None
    try:
        yield
    finally:
        reads.count_on_device = count


def measure(
    what: str, pair: tuple[Step, Step], method: str, device: torch.device, rule: TimingRule
) -> dict[str, object]:
    """A row: the first of the pair is the one that looks."""
    looking, plain = time_in_turn(pair, device=device, rule=rule)
    return {
        "what": what,
        "with_milliseconds": looking.seconds * 1e3,
        "without_milliseconds": plain.seconds * 1e3,
        "cost": looking.seconds / plain.seconds - 1,
        "spread": max(looking.spread, plain.spread),
        "method": method,
    }


def rows_of(step: Step, device: torch.device, rule: TimingRule) -> list[dict[str, object]]:
    """All pairs that this machine has."""
    before = MARKS.nvtx
    try:
        calls = (marked(step, True), marked(step, False))
        rows = [measure("ranges, calls", calls, "calls from the host", device, rule)]
        if device.type == "cuda":
            named, plain = map(capture, calls)
            with uncounted():
                quiet = capture(calls[1])
            for what, pair in (("ranges", (named, plain)), ("counts", (plain, quiet))):
                rows.append(measure(f"{what}, replays", pair, "CUDA graphs", device, rule))
        return rows
    finally:
        MARKS.switch(before)


def verdicts(rows: Sequence[dict[str, object]], *, on_gpu: bool) -> list[Verdict]:
    """The cost of each; nothing is decided without a GPU."""
    made = []
    for row in rows:
        cost = float(str(row["cost"]))
        note = f"blocks differ by up to {float(str(row['spread'])):.2%}"
        passed = cost <= BAR if on_gpu else None
        made.append(
            Verdict(str(row["what"]), cost, BAR, "share", passed, note if on_gpu else "no GPU")
        )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.quick:
        arguments.layers = min(arguments.layers, 4)
    device = command_line.default_device()
    rule = dataclasses.replace(command_line.timing_rule(arguments), repeats=REPEATS)
    shape = TINY if arguments.shape == "tiny" else LLAMA3_8B
    workload = Workload(shape=shape, batch=arguments.batch, context=arguments.context)
    workload = workload.with_layers(arguments.layers)
    setting = Setting(workload, device, arguments.fraction, arguments.remote, arguments.host_memory)
    rows: list[dict[str, object]] = []
    notes = ["the counters inside our kernels are in every time"]
    with torch.no_grad():
        inputs = workload.inputs(device, SEED)
        prepared = DakBackend().prepare(workload.build(device), inputs, setting)
        try:
            rows = rows_of(prepared.step, device, rule)
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
