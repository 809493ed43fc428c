"""A run over the cells of a grid, of linears or of attention: set-up, limits, rows, its record.

A run stopped by its time limit, or by an error of the device, keeps what it has.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from dak_inductor.benchmarks.harness import ceilings, command_line, linear_grid
from dak_inductor.benchmarks.harness.record import Record, Verdict, make_record
from dak_inductor.benchmarks.harness.table import verdict_table
from dak_inductor.benchmarks.harness.timing import TimingRule
from dak_inductor.benchmarks.harness.yardstick import Ceilings
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.tiers import open_tier

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FLAWS = {
    "accurate": "inaccurate",
    "repeatable": "not repeatable",
    "counted": "not served by the kernel",
}
"""The status of a row by the first of these entries that it has and that is false."""

Cell = TypeVar("Cell")


@dataclass(slots=True)
class Progress(Generic[Cell]):
    """What a run has so far. `stopped` says why it ends early."""

    rows: list[dict[str, object]] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    stopped: str = ""


@dataclass(frozen=True, slots=True)
class Run:
    """What every cell of a run shares. `deadline` is on the clock of `time.perf_counter`."""

    arguments: argparse.Namespace
    device: torch.device
    tier: Tier
    ceilings: Ceilings
    rule: TimingRule
    deadline: float

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.arguments.dtype]

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def add_options(made: argparse.ArgumentParser, *, peers: Sequence[str], record: str) -> None:
    """Those that are not about the shapes; `record` is the usual name of the JSON record."""
    made.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    made.add_argument("--peers", choices=peers, default="none")
    made.add_argument("--shard", type=linear_grid.parse_shard, default=linear_grid.Shard())
    made.add_argument("--seconds-per-cell", type=float, default=None, help="measured time of T")
    made.add_argument("--limit-seconds", type=float, default=None, help="begin no cell after that")
    made.add_argument("--record", default=record, help="name of the JSON record")


def begin(arguments: argparse.Namespace, *, quick_seconds: float, usual_seconds: float) -> Run:
    """Register the operators, measure the ceilings and open the tier."""
    begun = time.perf_counter()
    import dak_inductor.lowering.ops  # noqa: F401 - registers the operators

    device = command_line.default_device()
    usual = quick_seconds if arguments.quick else usual_seconds
    rule = TimingRule(target_seconds=arguments.seconds_per_cell or usual, warmup=1)
    found = ceilings.measure(device, arguments.remote, rule, host_memory=arguments.host_memory)
    tier = open_tier(
        arguments.remote,
        device=device if device.type == "cuda" else None,
        host_memory=arguments.host_memory,
    )
    deadline = begun + (arguments.limit_seconds or float("inf"))
    return Run(arguments, device, tier, found, rule, deadline)


def ends(run: Run, progress: Progress[Cell]) -> bool:
    """Whether no further cell is to begin."""
    if time.perf_counter() > run.deadline:
        progress.stopped = progress.stopped or "time limit: cells were left out"
    return bool(progress.stopped)


@contextlib.contextmanager
def watchdog(run: Run, seconds: float) -> Iterator[None]:
    """End the process with a traceback if the body takes longer; on a GPU only.

    A kernel that hangs cannot be interrupted; the record of the cells before it is written.
    """
    if run.on_gpu:
        faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        if run.on_gpu:
            faulthandler.cancel_dump_traceback_later()


def keep(
    run: Run,
    progress: Progress[Cell],
    row: dict[str, object],
    cell: Cell,
    *,
    over: Mapping[str, float],
    label: str,
) -> None:
    """A measured cell, the bars it is over (which count on a GPU alone), and its status."""
    row.update(over=over if run.on_gpu else {}, remote=run.arguments.remote)
    found = (status for entry, status in FLAWS.items() if not row.get(entry, True))
    row["status"] = next(found, "ok")
    progress.rows.append(row)
    progress.cells.append(cell)
    print(
        f"{label} {row['microseconds']:10.2f} us  "
        f"T/L {row['T/L']:.3f}  T/C {row['T/C']:.3f}  {row['status']}"
        f"{'  over' if row['over'] else ''}",
        file=sys.stderr,
        flush=True,
    )


def fail(run: Run, progress: Progress[Cell], where: Mapping[str, object], error: Exception) -> None:
    """A row with the reason; an error that broke the device's context ends the run."""
    row: dict[str, object] = {
        **where, "remote": run.arguments.remote, "status": "failed",
        "reason": f"{type(error).__name__}: {error}",
        "traceback": "".join(traceback.format_exception(error, limit=-6)),
    }  # fmt: skip
    progress.rows.append(row)
    print(_failure(row), file=sys.stderr, flush=True)
    if run.on_gpu:
        try:
            torch.cuda.synchronize(run.device)
        except RuntimeError as broken:
            progress.stopped = f"the device reports: {str(broken).splitlines()[0]}"


def release(run: Run, progress: Progress[Cell]) -> None:
    """Give back the memory of what a cell no longer holds."""
    gc.collect()
    if run.on_gpu and not progress.stopped.startswith("the device"):
        torch.cuda.synchronize(run.device)
        torch.cuda.empty_cache()


def write(
    run: Run,
    progress: Progress[Cell],
    *,
    verdicts: Sequence[Verdict],
    no_cells: str,
    notes: Sequence[str],
) -> Record:
    """The record so far. A verdict named `no_cells` counts the rows that are not ok."""
    arguments = run.arguments
    bad = sum(row["status"] != "ok" for row in progress.rows)
    record = make_record(
        arguments.record,
        arguments={
            **command_line.arguments_dict(arguments),
            "shapes": [str(shape) for shape in arguments.shapes],
            "shard": str(arguments.shard),
        },
        cells=progress.rows,
        verdicts=[*verdicts, Verdict(no_cells, float(bad), 0.0, "cells", not bad)],
        ceilings=run.ceilings.as_dict(),
        notes=(*notes, *([progress.stopped] if progress.stopped else [])),
        commit=arguments.commit,
    )
    record.write(arguments.out)
    return record


def conclude(
    record: Record, progress: Progress[Cell], *, title: str, grid: str, over: Callable[..., str]
) -> int:
    """Print the table `grid`, what failed, the cells `over` a bar, verdicts; the exit status."""
    gpu = record.environment.get("gpu") or "no GPU"
    print(f"== {title}, {record.arguments['remote']}: {gpu} ==")
    if grid:
        print(grid)
    for row in progress.rows:
        if row["status"] == "failed":
            print(f"failed: {_failure(row)}")
    if any(row.get("over") for row in progress.rows):
        print("\nover a bar:")
        print(over(progress.rows))
    print()
    print(verdict_table(record.verdicts))
    for note in record.notes:
        print(f"note: {note}")
    print(f"record: {record.benchmark}.json", flush=True)
    return 0 if record.passed and not progress.stopped else 1


def _failure(row: Mapping[str, object]) -> str:
    tokens = f" M={row['M']}" if "M" in row else ""
    return f"{row['shape']} {row['fraction']}{tokens}: {row['reason']}"
