"""Two fillers of the ring of copies ahead: copy engines, and a streamer of a few CTAs.

Copy engines, which the backend uses, take no SM and most of the link, but pause from part to part.
A streamer reads host memory by bulk copies through shared memory and need not pause. Measured on
one card, in CUDA graphs, in turn: the link's rate by size of the parts; what a resident product
takes beside each; and steps of products that read through the ring, bound by the link and by GPU
memory, over their bounds. It goes into the backend only where it wins.

    python benchmarks/bench_fillers.py --out DIR [--limit-seconds 25] [--seconds-per-cell 0.15]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from dak_inductor.benchmarks.harness import ceilings, command_line
from dak_inductor.benchmarks.harness.clock import Clock
from dak_inductor.benchmarks.harness.filler_beside import beside_rows
from dak_inductor.benchmarks.harness.filler_case import FillerCase, make_case
from dak_inductor.benchmarks.harness.filler_rate import gap_rows, rate_rows
from dak_inductor.benchmarks.harness.filler_step import LOCAL_SHARES, step_rows
from dak_inductor.benchmarks.harness.filler_verdicts import COLUMNS, verdicts
from dak_inductor.benchmarks.harness.record import make_record
from dak_inductor.benchmarks.harness.streamer_shape import StreamerShape, shape_for
from dak_inductor.benchmarks.harness.timing import TimingRule
from dak_inductor.benchmarks.harness.window_case import profile_limits
from dak_inductor.benchmarks.harness.yardstick import Ceilings
from dak_inductor.copy_ring import RING_BYTES
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.tiers import open_tier
from dak_inductor.cuda_runtime.window import default_window, window_of
from dak_inductor.lowering.linear.trials import TRIALS

CTAS = (1, 2, 4, 8)
PARTS = tuple(size << 20 for size in (4, 2, 8, 16))
"""Bytes; first the size that the others are compared with, where time runs out."""
SOURCE_BYTES = 1 << 30
QUICK_BYTES = 256 << 20
_BESIDE_SECONDS = 7e-3
"""Of one round of a product beside a filler."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = command_line.parser("Copy engines and a streamer as fillers of a ring")
    made.add_argument(
        "--limit-seconds", type=float, default=25.0, help="after which no cell is begun"
    )
    made.add_argument("--seconds-per-cell", type=float, default=0.15)
    made.add_argument(
        "--source-bytes", type=command_line.memory_bytes, default=None,
        help=f"remote memory to carry, {SOURCE_BYTES >> 20}MiB where not given",
    )  # fmt: skip
    made.add_argument("--ctas", type=cta_counts, default=CTAS, help="of streamers, such as 1,2,4")
    found = made.parse_args(argv)
    if found.source_bytes is None:
        found.source_bytes = QUICK_BYTES if found.quick else SOURCE_BYTES
    if found.source_bytes < QUICK_BYTES:
        made.error(f"--source-bytes: at least {QUICK_BYTES >> 20}MiB, a step and a fill need them")
    return found


def cta_counts(text: str) -> tuple[int, ...]:
    """'1,2,4' as numbers of CTAs."""
    counts = command_line.numbers(text, int, "1,2,4")
    if any(not 1 <= count <= 64 for count in counts):
        raise argparse.ArgumentTypeError(f"{text!r}: a streamer has 1 to 64 CTAs")
    return counts


def all_rows(
    case: FillerCase,
    tier: Tier,
    shapes: Sequence[StreamerShape],
    measured: Ceilings,
    rule: TimingRule,
    clock: Clock,
) -> list[dict[str, Any]]:
    """As far as time allows; the least a cell takes is guessed."""
    rows: list[dict[str, Any]] = []
    cells = len(shapes) + 1
    least = rule.target_seconds + 0.15
    for part_bytes in PARTS[:1]:
        if clock.allows(f"link, parts of {part_bytes >> 20} MiB", cells * least):
            rows += rate_rows(case, part_bytes, shapes, rule)
    for binds in LOCAL_SHARES:
        if clock.allows(f"step, {binds} binds", cells * least):
            rows += step_rows(case, binds, measured, shapes, rule)
    if clock.allows("products beside a filler", 2 * cells * least):
        rounds = max(5, round(rule.target_seconds / _BESIDE_SECONDS))
        rows += beside_rows(case, tier, shapes, rounds)
    for part_bytes in PARTS[1:]:
        if clock.allows(f"link, parts of {part_bytes >> 20} MiB", cells * least):
            rows += rate_rows(case, part_bytes, shapes, rule)
    return rows + gap_rows(rows)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    device = command_line.default_device()
    if device.type != "cuda" or arguments.remote == "simulated":
        raise SystemExit("a ring is filled over a link; this is no GPU with a remote tier")
    clock = Clock(arguments.limit_seconds)
    rule = TimingRule(target_seconds=arguments.seconds_per_cell, warmup=1)
    TRIALS.switch(False)  # the kernel, also where another way is faster
    measured = ceilings.measure(device, arguments.remote, rule, host_memory=arguments.host_memory)
    tier = open_tier(arguments.remote, device=device, host_memory=arguments.host_memory)
    link = window_of(device, tier.name)
    floor, knee = profile_limits(link)
    window = default_window(link.link)
    shapes = [shape_for(count, window) for count in arguments.ctas]
    case = make_case(tier, arguments.source_bytes, RING_BYTES, device)
    rows = all_rows(case, tier, shapes, measured, rule, clock)
    notes = [f"window by the profile: {window} bytes, floor {floor}, knee {knee}"]
    if clock.skipped:
        notes.append(f"no time left for: {', '.join(clock.skipped)}")
    record = make_record(
        "fillers" if arguments.remote == "cpu" else "fillers_peer",
        arguments=command_line.arguments_dict(arguments),
        cells=rows,
        verdicts=verdicts(rows),
        ceilings=measured.as_dict(),
        notes=notes,
        commit=arguments.commit,
    )
    return command_line.finish(record, COLUMNS, arguments.out)


if __name__ == "__main__":
    raise SystemExit(main())
