"""Decode attention over tiered caches by shape and remote fraction, against its bars.

The bars are data in `harness/attention_bars.py`. T / L of every cell (T / C where nothing is
remote), then every cell over its bar, are printed last. A run stopped by its time limit, or by an
error of the device, keeps what it has.

    python benchmarks/bench_attention.py --out DIR [--shapes 8x32768x8x4x128] [--quick]
        [--fractions 0,0.02] [--remote cuda:1] [--peers fast] [--shard 1/4] [--record NAME]
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from dak_inductor.benchmarks.harness import (
    attention_grid,
    attention_peers,
    ceilings,
    command_line,
    linear_grid,
)
from dak_inductor.benchmarks.harness.attention_bars import AttentionCell, missed, verdicts
from dak_inductor.benchmarks.harness.attention_grid import AttentionShape, Unit
from dak_inductor.benchmarks.harness.attention_measure import (
    ResidentCase,
    TieredCaches,
    measure_cell,
    resident_case,
    tiered_caches,
)
from dak_inductor.benchmarks.harness.attention_table import grid_table, over_table
from dak_inductor.benchmarks.harness.linear_measure import time_rounds
from dak_inductor.benchmarks.harness.record import Record, Verdict, make_record
from dak_inductor.benchmarks.harness.table import table, verdict_rows
from dak_inductor.benchmarks.harness.timing import TimingRule
from dak_inductor.benchmarks.harness.yardstick import Ceilings
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.tiers import open_tier

QUICK_SECONDS, USUAL_SECONDS = 0.1, 0.4
QUICK_FRACTIONS = (0.0, 0.01, 0.1, 1.0)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CELL_LIMIT_SECONDS = 240
"""A kernel that hangs cannot be interrupted: past this the process ends, its record written."""

NOTES = (
    "a shape is batch x tokens x heads of keys x query heads of each x head size (x queries)",
    "L counts the bytes of keys and values alone; in the tiered caches tokens are outermost",
    "C is the best of torch's backends on a resident cache, graph and rotation as for T",
)


@dataclass(slots=True)
class Progress:
    """What a run has so far. `stopped` says why it ends early."""

    rows: list[dict[str, object]] = field(default_factory=list)
    cells: list[AttentionCell] = field(default_factory=list)
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


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = command_line.parser(__doc__.splitlines()[0] if __doc__ else "")
    made.add_argument(
        "--shapes",
        type=attention_grid.parse_shapes,
        default=None,
        help="batch x tokens x heads of keys x ratio x head size (x queries), comma-separated",
    )
    made.add_argument("--fractions", type=command_line.fractions, default=None)
    made.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    made.add_argument("--peers", choices=attention_peers.CHOICES, default="none")
    made.add_argument("--shard", type=linear_grid.parse_shard, default=attention_grid.WHOLE_GRID)
    made.add_argument("--seconds-per-cell", type=float, default=None, help="measured time of T")
    made.add_argument("--limit-seconds", type=float, default=None, help="begin no cell after that")
    made.add_argument("--record", default="attention", help="name of the JSON record")
    arguments = made.parse_args(argv)
    if arguments.shapes is None:
        usual = attention_grid.QUICK_SHAPES if arguments.quick else attention_grid.SHAPES
        arguments.shapes = usual if torch.cuda.is_available() else attention_grid.TINY_SHAPES
    if arguments.fractions is None:
        arguments.fractions = QUICK_FRACTIONS if arguments.quick else attention_grid.FRACTIONS
    return arguments


def timing_rule(arguments: argparse.Namespace) -> TimingRule:
    usual = QUICK_SECONDS if arguments.quick else USUAL_SECONDS
    return TimingRule(target_seconds=arguments.seconds_per_cell or usual, warmup=1)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    begun = time.perf_counter()
    import dak_inductor.lowering.ops  # noqa: F401 - registers the operator

    device, rule = command_line.default_device(), timing_rule(arguments)
    found = ceilings.measure(device, arguments.remote, rule, host_memory=arguments.host_memory)
    tier = open_tier(
        arguments.remote,
        device=device if device.type == "cuda" else None,
        host_memory=arguments.host_memory,
    )
    deadline = begun + (arguments.limit_seconds or float("inf"))
    run = Run(arguments, device, tier, found, rule, deadline)
    progress = Progress()
    units = attention_grid.units(arguments.shapes, arguments.fractions, arguments.shard)
    with torch.no_grad():
        for shape in dict.fromkeys(unit.shape for unit in units):
            if not progress.stopped:
                measure_shape(run, shape, [u for u in units if u.shape == shape], progress)
                _release(device, progress)
    record = _write(run, progress)
    _print(record, progress)
    return 0 if record.passed and not progress.stopped else 1


def measure_shape(run: Run, shape: AttentionShape, units: list[Unit], progress: Progress) -> None:
    """All cells of one shape: C once, then fraction by fraction."""
    case: ResidentCase | None = None
    for unit in units:
        if time.perf_counter() > run.deadline:
            progress.stopped = progress.stopped or "time limit: cells were left out"
        if progress.stopped:
            break
        with _watchdog(run.device):
            try:
                if case is None:
                    case = resident_case(
                        shape, DTYPES[run.arguments.dtype], run.device, run.ceilings, run.rule
                    )
                _measure_unit(run, case, unit, progress)
            except Exception as error:  # one that does not fit is a row, the others still count
                _failed(run, unit, error, progress)
        _release(run.device, progress)
        _write(run, progress)


def _measure_unit(run: Run, case: ResidentCase, unit: Unit, progress: Progress) -> None:
    tiered = tiered_caches(case, run.tier, unit.fraction)
    row, cell = measure_cell(case, tiered, unit.fraction, run.ceilings, run.rule)
    row["peers_microseconds"] = _peers(run, case, cell, tiered)
    on_gpu = run.device.type == "cuda"
    row.update(over=missed(cell) if on_gpu else {}, remote=run.arguments.remote, status="ok")
    if not row["accurate"]:
        row["status"] = "inaccurate"
    elif not row["repeatable"]:
        row["status"] = "not repeatable"
    elif not row["counted"]:
        row["status"] = "not served by the kernel"
    progress.rows.append(row)
    progress.cells.append(cell)
    print(
        f"{row['shape']:>20} {row['fraction']:<6} {row['microseconds']:10.2f} us  "
        f"T/L {row['T/L']:.3f}  T/C {row['T/C']:.3f}  {row['status']}"
        f"{'  over' if row['over'] else ''}",
        file=sys.stderr,
        flush=True,
    )


def _peers(
    run: Run, case: ResidentCase, cell: AttentionCell, tiered: TieredCaches
) -> dict[str, object]:
    """Microseconds of each peer asked for, or why it does not run."""
    made: dict[str, object] = {}
    bound = max(cell.direct, cell.resident)
    for name in attention_peers.chosen(run.arguments.peers, cell.fraction, cell.cache_bytes):
        try:
            if name == attention_peers.STOCK:
                round_ = attention_peers.attention_round(case.best, case.query, tiered.caches)
            else:
                layers = attention_peers.OffloadedLayers(case.caches, run.arguments.remote)
                round_ = layers.round(case.best, case.query)
            timed = time_rounds(round_, len(tiered.caches), bound, device=run.device, rule=run.rule)
            made[name] = timed.timing.seconds * 1e6
        except RuntimeError as error:
            made[name] = str(error).splitlines()[0]
    return made


def _failed(run: Run, unit: Unit, error: Exception, progress: Progress) -> None:
    """A row with the reason; an error that broke the device's context ends the run."""
    row: dict[str, object] = {
        "shape": str(unit.shape), "fraction": unit.fraction,
        "remote": run.arguments.remote, "status": "failed",
        "reason": f"{type(error).__name__}: {error}",
        "traceback": "".join(traceback.format_exception(error, limit=-6)),
    }  # fmt: skip
    progress.rows.append(row)
    print(f"{unit.shape} {unit.fraction}: {row['reason']}", file=sys.stderr, flush=True)
    if run.device.type == "cuda":
        try:
            torch.cuda.synchronize(run.device)
        except RuntimeError as broken:
            progress.stopped = f"the device reports: {str(broken).splitlines()[0]}"


@contextlib.contextmanager
def _watchdog(device: torch.device) -> Iterator[None]:
    """End the process with a traceback if the body takes too long; on a GPU only."""
    if device.type == "cuda":
        faulthandler.dump_traceback_later(CELL_LIMIT_SECONDS, exit=True)
    try:
        yield
    finally:
        if device.type == "cuda":
            faulthandler.cancel_dump_traceback_later()


def _release(device: torch.device, progress: Progress) -> None:
    gc.collect()
    if device.type == "cuda" and not progress.stopped.startswith("the device"):
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _write(run: Run, progress: Progress) -> Record:
    """The record so far; written after every cell."""
    arguments = run.arguments
    checked = verdicts(progress.cells, on_gpu=run.device.type == "cuda")
    bad = [row for row in progress.rows if row["status"] != "ok"]
    name = "cells failed, inaccurate, not repeatable or not served"
    checked.append(Verdict(name, float(len(bad)), 0.0, "cells", not bad))
    record = make_record(
        arguments.record,
        arguments={
            **command_line.arguments_dict(arguments),
            "shapes": [str(shape) for shape in arguments.shapes],
            "shard": str(arguments.shard),
        },
        cells=progress.rows,
        verdicts=checked,
        ceilings=run.ceilings.as_dict(),
        notes=(*NOTES, *([progress.stopped] if progress.stopped else [])),
        commit=arguments.commit,
    )
    record.write(arguments.out)
    return record


def _print(record: Record, progress: Progress) -> None:
    gpu = record.environment.get("gpu") or "no GPU"
    print(f"== attention, {record.arguments['remote']}: {gpu} ==")
    if progress.rows:
        print(grid_table(progress.rows))
    for row in progress.rows:
        if row["status"] == "failed":
            print(f"failed: {row['shape']} {row['fraction']}: {row['reason']}")
    if any(row.get("over") for row in progress.rows):
        print("\nover a bar:")
        print(over_table(progress.rows))
    print()
    columns = ("what", "measured", "bar", "unit", "verdict", "note")
    print(table(verdict_rows(record.verdicts), columns))
    for note in record.notes:
        print(f"note: {note}")
    print(f"record: {record.benchmark}.json", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
