"""What a filler of a ring makes of the link where the products behind it take no time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dak_inductor.benchmarks.harness.filler_case import (
    FillerCase,
    captured_all,
    columns_of,
    fillers_of,
    replay_or_copy,
)
from dak_inductor.benchmarks.harness.ring_filler import RingFiller, carried
from dak_inductor.benchmarks.harness.ring_load import RingLoad
from dak_inductor.benchmarks.harness.streamer_shape import StreamerShape
from dak_inductor.benchmarks.harness.timing import TimingRule, time_in_turn

_TOUCHED = 256
"""Bytes of a part that the timed step reads; 64 words, at once."""


def rate_rows(
    case: FillerCase, part_bytes: int, shapes: Sequence[StreamerShape], rule: TimingRule
) -> list[dict[str, Any]]:
    """All of the source in parts, by each filler in turn. A replay before keeps all that arrives,
    and the timed ones the start of each part; both are compared with the source."""
    load = case.load(part_bytes)
    fillers = fillers_of(load, shapes, case.device)
    kept = torch.empty((len(load), part_bytes), dtype=torch.uint8, device=case.device)
    touched = torch.empty((len(load), _TOUCHED), dtype=torch.uint8, device=case.device)
    wanted = case.reference[: load.nbytes].view(len(load), part_bytes)
    keep, touch = _reader(load, kept), _reader(load, touched)
    for read in (keep, touch):
        read(0)
    problems = [_problem(case, filler, fillers[0], keep, kept, wanted) for filler in fillers]
    steps = captured_all(fillers, lambda filler: carried(filler, touch))
    starts = wanted[:, :_TOUCHED]
    for position, (filler, step) in enumerate(zip(fillers, steps, strict=True)):
        if problems[position]:
            continue
        touched.zero_()
        step()
        problems[position] = filler.given_up() or _differing(touched, starts)
    good = [step for step, problem in zip(steps, problems, strict=True) if not problem]
    timings = iter(time_in_turn(good, device=case.device, rule=rule))
    rows = []
    for filler, problem in zip(fillers, problems, strict=True):
        row = {"part": "link", **columns_of(filler), "parts": len(load), "nbytes": load.nbytes}
        timing = None if problem else next(timings)
        problem = problem or filler.given_up()
        if timing is not None and not problem:
            row |= {
                "gigabytes_per_second": load.nbytes / timing.seconds / 1e9,
                "seconds": timing.seconds,
                "repeats": timing.repeats,
                "spread": timing.spread,
            }
        rows.append({**row, "status": problem or "ok"})
    return rows


def gap_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a part costs besides its bytes, by filler: the slope of seconds over the number of
    parts, by least squares. Where the line starts is the rate between the gaps."""
    found = []
    timed = [row for row in rows if row["part"] == "link" and "seconds" in row]
    for name in dict.fromkeys(row["filler"] for row in timed):
        own = [row for row in timed if row["filler"] == name]
        # both by the byte, since a source need not be a whole number of each size
        points = [(row["parts"] / row["nbytes"], row["seconds"] / row["nbytes"]) for row in own]
        line = _line(points)
        if line is None:
            continue
        start, slope = line
        found.append(
            {
                "part": "gap",
                "filler": name,
                "gap_microseconds": slope * 1e6,
                "gigabytes_per_second": 1e-9 / start,
                "status": "ok",
            }
        )
    return found


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Start and slope; None through fewer than two numbers of parts."""
    if len({x for x, _ in points}) < 2:
        return None
    middle = sum(x for x, _ in points) / len(points)
    height = sum(y for _, y in points) / len(points)
    spread = sum((x - middle) ** 2 for x, _ in points)
    slope = sum((x - middle) * (y - height) for x, y in points) / spread
    return height - slope * middle, slope


def _reader(load: RingLoad, target: Tensor) -> Callable[[int], object]:
    """Reads the start of each part, as much as a row of `target` holds, into that row.

    By a kernel: torch's copies are a copy engine's, and would queue among those of the link.
    """
    words = target.view(torch.int32)

    def read(part: int) -> None:
        held = load.held(part)[: target.shape[1]].view(torch.int32)
        torch.bitwise_or(held, 0, out=words[part])

    return read


def _problem(
    case: FillerCase,
    filler: RingFiller,
    copies: RingFiller,
    keep: Callable[[int], object],
    kept: Tensor,
    wanted: Tensor,
) -> str:
    case.poison()
    kept.zero_()
    return replay_or_copy(
        filler, copies, lambda each: carried(each, keep), lambda: _differing(kept, wanted)
    )


def _differing(found: Tensor, wanted: Tensor) -> str:
    """How many rows are not the same; "" for none."""
    if torch.equal(found, wanted):
        return ""
    count = int((found != wanted).any(dim=1).sum())
    return f"wrong: {count} of {len(wanted)} parts are not as in the source"
