"""Attention over tiered caches, decode and prefill, by shape and remote fraction, against its bars.

The bars are data in `harness/attention_bars.py`. T / L of every cell (T / C where nothing is
remote), then every cell over its bar, are printed last. A run stopped by its time limit, or by an
error of the device, keeps what it has.

    python benchmarks/bench_attention.py --out DIR [--shapes 8x32768x8x4x128] [--quick]
        [--fractions 0,0.02] [--remote cuda:1] [--peers fast] [--shard 1/4] [--record NAME]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from dak_inductor.benchmarks.harness import (
    attention_grid,
    attention_peers,
    command_line,
    grid_run,
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
from dak_inductor.benchmarks.harness.grid_run import Progress, Run
from dak_inductor.benchmarks.harness.record import Record
from dak_inductor.benchmarks.harness.rounds import make_rounds, time_rounds

QUICK_SECONDS, USUAL_SECONDS = 0.1, 0.4
QUICK_FRACTIONS = (0.0, 0.01, 0.1, 1.0)
CELL_LIMIT_SECONDS = 240
"""Past this the process ends: see `grid_run.watchdog`."""

NOTES = (
    "a shape is batch x tokens x heads of keys x query heads of each x head size (x queries)",
    "L counts the bytes of keys and values alone; in the tiered caches tokens are outermost",
    "C is the best of torch's backends on a resident cache, measured as T is and in turn with it",
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = command_line.parser(__doc__.splitlines()[0] if __doc__ else "")
    made.add_argument(
        "--shapes",
        type=attention_grid.parse_shapes,
        default=None,
        help="batch x tokens x heads of keys x ratio x head size (x queries), comma-separated",
    )
    made.add_argument("--fractions", type=command_line.fractions, default=None)
    grid_run.add_options(made, peers=attention_peers.CHOICES, record="attention")
    arguments = made.parse_args(argv)
    if arguments.shapes is None:
        usual = attention_grid.QUICK_SHAPES if arguments.quick else attention_grid.SHAPES
        arguments.shapes = usual if torch.cuda.is_available() else attention_grid.TINY_SHAPES
    if arguments.fractions is None:
        arguments.fractions = QUICK_FRACTIONS if arguments.quick else attention_grid.FRACTIONS
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    run = grid_run.begin(arguments, quick_seconds=QUICK_SECONDS, usual_seconds=USUAL_SECONDS)
    progress = Progress[AttentionCell]()
    units = attention_grid.units(arguments.shapes, arguments.fractions, arguments.shard)
    with torch.no_grad():
        for shape in dict.fromkeys(unit.shape for unit in units):
            if not progress.stopped:
                measure_shape(run, shape, [u for u in units if u.shape == shape], progress)
                grid_run.release(run, progress)
    record = _write(run, progress)
    grid = grid_table(progress.rows) if progress.rows else ""
    return grid_run.conclude(record, progress, title="attention", grid=grid, over=over_table)


def measure_shape(
    run: Run, shape: AttentionShape, units: list[Unit], progress: Progress[AttentionCell]
) -> None:
    """All cells of one shape: its best stock backend once, then fraction by fraction."""
    case: ResidentCase | None = None
    for unit in units:
        if grid_run.ends(run, progress):
            break
        with grid_run.watchdog(run, CELL_LIMIT_SECONDS):
            try:
                if case is None:
                    case = resident_case(shape, run.dtype, run.device, run.ceilings, run.rule)
                _measure_unit(run, case, unit, progress)
            except Exception as error:  # one that does not fit is a row, the others still count
                grid_run.fail(run, progress, _place(unit), error)
        grid_run.release(run, progress)
        _write(run, progress)


def _measure_unit(
    run: Run, case: ResidentCase, unit: Unit, progress: Progress[AttentionCell]
) -> None:
    tiered = tiered_caches(case, run.tier, unit.fraction)
    row, cell = measure_cell(case, tiered, unit.fraction, run.ceilings, run.rule)
    row["peers_microseconds"] = _peers(run, case, cell, tiered)
    label = f"{row['shape']:>20} {row['fraction']:<6}"
    grid_run.keep(run, progress, row, cell, over=missed(cell), label=label)


def _place(unit: Unit) -> dict[str, object]:
    return {"shape": str(unit.shape), "fraction": unit.fraction}


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
            rounds = make_rounds(round_, len(tiered.caches), bound, device=run.device)
            (timing,) = time_rounds([rounds], device=run.device, rule=run.rule)
            made[name] = timing.seconds * 1e6
        except RuntimeError as error:
            made[name] = str(error).splitlines()[0]
    return made


def _write(run: Run, progress: Progress[AttentionCell]) -> Record:
    """The record so far; written after every cell."""
    return grid_run.write(
        run,
        progress,
        verdicts=verdicts(progress.cells, on_gpu=run.on_gpu),
        no_cells="cells failed, inaccurate, not repeatable or not served",
        notes=NOTES,
    )


if __name__ == "__main__":
    raise SystemExit(main())
