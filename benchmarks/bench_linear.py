"""Single linears on tiered weights by shape, token count and remote fraction, against their bars.

The bars are data in `harness/linear_bars.py`. T / L of every cell, then every cell over its bar,
are printed last. A run stopped by its time limit, or by an error of the device, keeps what it has.

    python benchmarks/bench_linear.py --out DIR [--shapes 28672x8192] [--m decode,256] [--quick]
        [--fractions 0,0.02] [--remote cuda:1] [--peers fast] [--shard 1/4] [--record linear_peer]
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
from torch import Tensor

from dak_inductor.benchmarks.harness import ceilings, command_line, linear_grid, linear_peers
from dak_inductor.benchmarks.harness.linear_bars import LinearCell, missed, verdicts
from dak_inductor.benchmarks.harness.linear_grid import LinearShape, Unit
from dak_inductor.benchmarks.harness.linear_measure import (
    TokenCase,
    copies_needed,
    fresh_values,
    measure_cell,
    time_rounds,
    token_case,
)
from dak_inductor.benchmarks.harness.linear_table import grid_table, over_table
from dak_inductor.benchmarks.harness.linear_weights import TieredWeights, split_at, tiered_copies
from dak_inductor.benchmarks.harness.record import Record, Verdict, make_record
from dak_inductor.benchmarks.harness.table import table, verdict_rows
from dak_inductor.benchmarks.harness.timing import TimingRule
from dak_inductor.benchmarks.harness.yardstick import Ceilings
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.tiers import open_tier

QUICK_SECONDS, USUAL_SECONDS = 0.15, 0.5
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CELL_LIMIT_SECONDS = 120
"""A kernel that hangs cannot be interrupted: past this the process ends, its record written."""

NOTES = (
    "L counts the bytes of the weight alone; M, N, K as in y [M, N] = x [M, K] @ weight [N, K].T",
    "C is the stock kernel on a resident tensor, graph and rotation as for T",
)


@dataclass(slots=True)
class Progress:
    """What a run has so far. `stopped` says why it ends early."""

    rows: list[dict[str, object]] = field(default_factory=list)
    cells: list[LinearCell] = field(default_factory=list)
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


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = command_line.parser(__doc__.splitlines()[0] if __doc__ else "")
    on_gpu = torch.cuda.is_available()
    made.add_argument(
        "--shapes",
        type=linear_grid.parse_shapes,
        default=linear_grid.SHAPES if on_gpu else linear_grid.TINY_SHAPES,
        help="weights [N, K], such as 28672x8192,4096x4096",
    )
    made.add_argument(
        "--m",
        type=linear_grid.parse_tokens,
        default=linear_grid.DECODE_TOKENS + linear_grid.PREFILL_TOKENS if on_gpu else (1, 8, 256),
        help="token counts; 'decode' and 'prefill' are the grid's",
    )
    made.add_argument("--fractions", type=command_line.fractions, default=linear_grid.FRACTIONS)
    made.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    made.add_argument("--peers", choices=linear_peers.CHOICES, default="none")
    made.add_argument("--shard", type=linear_grid.parse_shard, default=linear_grid.Shard())
    made.add_argument("--seconds-per-cell", type=float, default=None, help="measured time of T")
    made.add_argument("--limit-seconds", type=float, default=None, help="begin no cell after that")
    made.add_argument("--record", default="linear", help="name of the JSON record")
    return made.parse_args(argv)


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
    units = linear_grid.units(arguments.shapes, arguments.fractions, arguments.shard)
    with torch.no_grad():
        for shape in dict.fromkeys(unit.shape for unit in units):
            if not progress.stopped:
                measure_shape(run, shape, [u for u in units if u.shape == shape], progress)
    record = _write(run, progress)
    _print(record, progress)
    return 0 if record.passed and not progress.stopped else 1


def measure_shape(run: Run, shape: LinearShape, units: list[Unit], progress: Progress) -> None:
    """All cells of one shape: C and the references once, then fraction by fraction."""
    copies = copies_needed(shape.weight_bytes(run.dtype), run.device)
    values = fresh_values(shape, run.dtype, run.device)
    resident = [values.clone() for _ in range(copies)]
    cases: dict[int, TokenCase] = {}
    for unit in units:
        split = split_at(values.nbytes, unit.fraction)
        prefetched: list[linear_peers.PrefetchedRows] = []
        try:
            weights = tiered_copies(values, run.tier, split=split, copies=copies)
        except Exception as error:  # one that does not fit is a row, the others still count
            _failed(run, unit, 0, error, progress)
            continue
        for tokens in run.arguments.m:
            if time.perf_counter() > run.deadline:
                progress.stopped = progress.stopped or "time limit: cells were left out"
            if progress.stopped:
                break
            with _watchdog(run.device):
                try:
                    if tokens not in cases:
                        cases[tokens] = token_case(tokens, resident, run.ceilings, run.rule)
                    row, cell = measure_cell(
                        cases[tokens], weights, shape, unit.fraction, run.ceilings, run.rule
                    )
                    row["peers_microseconds"] = _peers(
                        run, cases[tokens], cell, weights, resident, prefetched
                    )
                except Exception as error:
                    _failed(run, unit, tokens, error, progress)
                    continue
            _judged(run, row, cell, progress)
        del weights, prefetched
        _release(run.device, progress)
        _write(run, progress)


def _judged(run: Run, row: dict[str, object], cell: LinearCell, progress: Progress) -> None:
    over = {bar.name: excess for bar, excess in missed(cell)}
    on_gpu = run.device.type == "cuda"
    row.update(over=over if on_gpu else {}, remote=run.arguments.remote, status="ok")
    if not row["accurate"]:
        row["status"] = "inaccurate"
    elif not row["repeatable"]:
        row["status"] = "not repeatable"
    progress.rows.append(row)
    progress.cells.append(cell)
    print(
        f"{row['shape']:>12} {row['fraction']:<6} M={row['M']:<5} {row['microseconds']:10.2f} us  "
        f"T/L {row['T/L']:.3f}  T/C {row['T/C']:.3f}  {row['status']}"
        f"{'  over' if row['over'] else ''}",
        file=sys.stderr,
        flush=True,
    )


def _failed(run: Run, unit: Unit, tokens: int, error: Exception, progress: Progress) -> None:
    """A row with the reason; an error that broke the device's context ends the run."""
    row: dict[str, object] = {
        "shape": str(unit.shape), "M": tokens, "fraction": unit.fraction,
        "remote": run.arguments.remote, "status": "failed",
        "reason": f"{type(error).__name__}: {error}",
        "traceback": "".join(traceback.format_exception(error, limit=-6)),
    }  # fmt: skip
    progress.rows.append(row)
    print(f"{unit.shape} {unit.fraction} M={tokens}: {row['reason']}", file=sys.stderr, flush=True)
    if run.device.type == "cuda":
        try:
            torch.cuda.synchronize(run.device)
        except RuntimeError as broken:
            progress.stopped = f"the device reports: {str(broken).splitlines()[0]}"


def _peers(
    run: Run,
    case: TokenCase,
    cell: LinearCell,
    weights: TieredWeights,
    resident: Sequence[Tensor],
    prefetched: list[linear_peers.PrefetchedRows],
) -> dict[str, float]:
    """Microseconds of each peer asked for; the rows to prefetch are set up once per unit."""
    made = {}
    bound = max(cell.direct, cell.resident)
    for name in linear_peers.chosen(run.arguments.peers, case.tokens, cell.fraction):
        if name == linear_peers.STOCK:
            round_ = linear_peers.linear_round(case.x, weights.tensors)
        else:
            if not prefetched:
                prefetched.append(
                    linear_peers.PrefetchedRows(resident, cell.fraction, run.arguments.remote)
                )
            round_ = prefetched[0].round(case.x)
        timed = time_rounds(round_, len(weights.tensors), bound, device=run.device, rule=run.rule)
        made[name] = timed.timing.seconds * 1e6
    return made


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
    """The record so far; written after every unit."""
    arguments = run.arguments
    on_gpu = run.device.type == "cuda"
    checked = verdicts(progress.cells, on_gpu=on_gpu)
    bad = [row for row in progress.rows if row["status"] != "ok"]
    checked.append(
        Verdict(
            "cells failed, inaccurate or not repeatable", float(len(bad)), 0.0, "cells", not bad
        )
    )
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
    print(
        f"== linear, {record.arguments['remote']}: {record.environment.get('gpu') or 'no GPU'} =="
    )
    measured = [row for row in progress.rows if row["M"]]
    if measured:
        print(grid_table(measured))
    for row in progress.rows:
        if row["status"] == "failed":
            print(f"failed: {row['shape']} {row['fraction']} M={row['M']}: {row['reason']}")
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
