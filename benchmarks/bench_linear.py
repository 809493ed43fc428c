"""Single linears on tiered weights by shape, token count and remote fraction, against their bars.

The bars are data in `harness/linear_bars.py`. T / L of every cell, then every cell over its bar,
are printed last. A run stopped by its time limit, or by an error of the device, keeps what it has.

    python benchmarks/bench_linear.py --out DIR [--shapes 28672x8192] [--m decode,256] [--quick]
        [--fractions 0,0.02] [--remote cuda:1] [--peers fast] [--shard 1/4] [--record linear_peer]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from dak_inductor.benchmarks.harness import command_line, grid_run, linear_grid, linear_peers
from dak_inductor.benchmarks.harness.grid_run import Progress, Run
from dak_inductor.benchmarks.harness.linear_bars import LinearCell, missed, verdicts
from dak_inductor.benchmarks.harness.linear_grid import LinearShape, Unit
from dak_inductor.benchmarks.harness.linear_measure import (
    TokenCase,
    fresh_values,
    measure_cell,
    token_case,
)
from dak_inductor.benchmarks.harness.linear_table import grid_table, over_table
from dak_inductor.benchmarks.harness.linear_weights import TieredWeights, split_at, tiered_copies
from dak_inductor.benchmarks.harness.record import Record
from dak_inductor.benchmarks.harness.rounds import copies_needed, make_rounds, time_rounds

QUICK_SECONDS, USUAL_SECONDS = 0.15, 0.5
CELL_LIMIT_SECONDS = 120
"""Past this the process ends: see `grid_run.watchdog`."""

NOTES = (
    "L counts the bytes of the weight alone; M, N, K as in y [M, N] = x [M, K] @ weight [N, K].T",
    "C is the stock kernel on a resident tensor, graph and rotation as for T, in turn with it",
)


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
    grid_run.add_options(made, peers=linear_peers.CHOICES, record="linear")
    return made.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    run = grid_run.begin(arguments, quick_seconds=QUICK_SECONDS, usual_seconds=USUAL_SECONDS)
    progress = Progress[LinearCell]()
    units = linear_grid.units(arguments.shapes, arguments.fractions, arguments.shard)
    with torch.no_grad():
        for shape in dict.fromkeys(unit.shape for unit in units):
            if not progress.stopped:
                measure_shape(run, shape, [u for u in units if u.shape == shape], progress)
    record = _write(run, progress)
    measured = [row for row in progress.rows if row["M"]]
    grid = grid_table(measured) if measured else ""
    return grid_run.conclude(record, progress, title="linear", grid=grid, over=over_table)


def measure_shape(
    run: Run, shape: LinearShape, units: list[Unit], progress: Progress[LinearCell]
) -> None:
    """All cells of one shape: the references once, then fraction by fraction."""
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
            grid_run.fail(run, progress, _place(unit, 0), error)
            continue
        for tokens in run.arguments.m:
            if grid_run.ends(run, progress):
                break
            with grid_run.watchdog(run, CELL_LIMIT_SECONDS):
                try:
                    if tokens not in cases:
                        cases[tokens] = token_case(tokens, resident, run.ceilings)
                    row, cell = measure_cell(
                        cases[tokens], weights, shape, unit.fraction, run.ceilings, run.rule
                    )
                    row["peers_microseconds"] = _peers(
                        run, cases[tokens], cell, weights, resident, prefetched
                    )
                except Exception as error:
                    grid_run.fail(run, progress, _place(unit, tokens), error)
                    continue
            label = f"{row['shape']:>12} {row['fraction']:<6} M={row['M']:<5}"
            over = {bar.name: excess for bar, excess in missed(cell)}
            grid_run.keep(run, progress, row, cell, over=over, label=label)
        del weights, prefetched
        grid_run.release(run, progress)
        _write(run, progress)


def _place(unit: Unit, tokens: int) -> dict[str, object]:
    return {"shape": str(unit.shape), "M": tokens, "fraction": unit.fraction}


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
        rounds = make_rounds(round_, len(weights.tensors), bound, device=run.device)
        (timing,) = time_rounds([rounds], device=run.device, rule=run.rule)
        made[name] = timing.seconds * 1e6
    return made


def _write(run: Run, progress: Progress[LinearCell]) -> Record:
    """The record so far; written after every unit."""
    return grid_run.write(
        run,
        progress,
        verdicts=verdicts(progress.cells, on_gpu=run.on_gpu),
        no_cells="cells failed, inaccurate or not repeatable",
        notes=NOTES,
    )


if __name__ == "__main__":
    raise SystemExit(main())
