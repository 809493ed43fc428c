"""What a product that reads nothing remote takes beside a filler that never waits."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import dak_inductor.lowering.ops  # noqa: F401 - registers the operators
from dak_inductor.benchmarks.harness.filler_case import (
    ROW,
    FillerCase,
    captured_all,
    columns_of,
    fillers_of,
)
from dak_inductor.benchmarks.harness.linear_case import CallSpec, make_case
from dak_inductor.benchmarks.harness.ring_filler import free_running
from dak_inductor.benchmarks.harness.streamer_shape import StreamerShape
from dak_inductor.benchmarks.harness.timing import CapturedStep, capture
from dak_inductor.cuda_runtime.tier import Tier

ROWS = 28672
PRODUCTS = 12
"""In a graph: 1.3 ms and more, while the fillers have 5 ms to do."""
PART_BYTES = 4 << 20
FILLED_BYTES = 256 << 20
HEAD_START_CYCLES = 200_000
"""0.1 ms in which a filler comes to its full rate."""


@dataclass(frozen=True, slots=True)
class BesideTime:
    """Of the products, and of the filler where there was one. `covered`: it ran all the while."""

    seconds: float
    filled: float | None
    covered: bool


@dataclass(slots=True)
class _Series:
    """Rounds of one product beside one filler."""

    columns: dict[str, object]
    products: CapturedStep
    fill: CapturedStep | None
    times: list[BesideTime] = field(default_factory=list)


def beside_rows(
    case: FillerCase, tier: Tier, shapes: Sequence[StreamerShape], rounds: int
) -> list[dict[str, Any]]:
    """Our product and torch's, one token on a weight that outgrows the L2 cache, alone and beside
    each filler, in turn."""
    nbytes = min(FILLED_BYTES, case.source.numel())
    fillers = fillers_of(case.load(PART_BYTES, nbytes).unread(), shapes, case.device)
    fills: list[CapturedStep | None] = [None, *captured_all(fillers, free_running)]
    columns: list[dict[str, object]] = [{"filler": "none"}, *map(columns_of, fillers)]
    side = torch.cuda.Stream(case.device)
    series, products = [], _products(tier, case.device)  # graphs keep no weights alive
    for name, product in products.items():
        graph = capture(_repeated(product), warmup=1)
        for own, fill in zip(columns, fills, strict=True):
            series.append(_Series({"part": "beside", "product": name, **own}, graph, fill))
    for _ in range(rounds + 1):
        for each in series:
            each.times.append(_time(each.products, each.fill, side))
    alone: dict[object, float] = {}
    return [_row(each, nbytes, alone) for each in series]


def _row(series: _Series, nbytes: int, alone: dict[object, float]) -> dict[str, Any]:
    """From all rounds but the first. `alone` learns what each product takes beside nothing."""
    times = series.times[1:]
    seconds = statistics.median(each.seconds for each in times) / PRODUCTS
    filled = [each.filled for each in times if each.filled is not None]
    row: dict[str, Any] = {
        **series.columns,
        "seconds": seconds,
        "over_alone": seconds / alone.setdefault(series.columns["product"], seconds),
        "hbm_gigabytes_per_second": ROWS * ROW * 2 / seconds / 1e9,
        "status": "ok" if all(each.covered for each in times) else "not covered by the filler",
    }
    if filled:
        # of the whole fill, the products' time and the time without them
        row["gigabytes_per_second"] = nbytes / statistics.median(filled) / 1e9
    return row


def _products(tier: Tier, device: torch.device) -> dict[str, Callable[[], object]]:
    ours = make_case(CallSpec(1, ROWS, ROW, splits=(ROWS * ROW * 2,)), tier, device)
    x, weight = ours.resident.x, ours.resident.weights[0]
    out = torch.empty((1, ROWS), dtype=x.dtype, device=device)
    return {"tiered_linear": ours.run, "torch.mm": lambda: torch.mm(x, weight.t(), out=out)}


def _repeated(product: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(PRODUCTS):
            product()

    return run


def _time(products: CapturedStep, fill: CapturedStep | None, side: torch.cuda.Stream) -> BesideTime:
    """One replay of each, the filler's first, on two streams that do not wait for each other."""
    origin, begun, ended, first, last = (torch.cuda.Event(enable_timing=True) for _ in range(5))
    torch.cuda.synchronize()
    origin.record()
    if fill is not None:
        with torch.cuda.stream(side):
            side.wait_event(origin)
            begun.record()
            fill()
            ended.record()
    torch.cuda._sleep(HEAD_START_CYCLES)
    first.record()
    products()
    last.record()
    torch.cuda.synchronize()
    start, stop = (origin.elapsed_time(mark) / 1e3 for mark in (first, last))
    if fill is None:
        return BesideTime(stop - start, None, True)
    since, until = (origin.elapsed_time(mark) / 1e3 for mark in (begun, ended))
    return BesideTime(stop - start, until - since, since < start and stop < until)
