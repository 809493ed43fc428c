"""A step of products that each read local rows in place and their other rows from the ring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dak_inductor.benchmarks.harness.filler_case import (
    ROW,
    ROW_BYTES,
    FillerCase,
    captured_all,
    columns_of,
    fillers_of,
    replay_or_copy,
)
from dak_inductor.benchmarks.harness.ring_filler import carried
from dak_inductor.benchmarks.harness.ring_load import RingLoad
from dak_inductor.benchmarks.harness.streamer_shape import StreamerShape
from dak_inductor.benchmarks.harness.timing import TimingRule, capture, time_in_turn
from dak_inductor.benchmarks.harness.yardstick import Ceilings, Work, step_bound

TOKENS = 16
PRODUCTS = 24
PART_BYTES = 4 << 20
LOCAL_SHARES = {"link": 0.5, "hbm": 2.0}
"""Time of a product's local rows over that of its part on the link, by what then binds."""
_WEIGHTS = 4
"""Local ones, used in turn: together they outgrow the L2 cache."""
_TOLERANCE = 0.05
"""Of results around 1, in bfloat16; another part's rows would give others altogether."""


@dataclass(frozen=True, slots=True)
class FillerStep:
    """`outputs` [products, tokens, rows] are what came of the rows in the ring."""

    load: RingLoad
    x: Tensor
    weights: tuple[Tensor, ...]
    local_output: Tensor
    outputs: Tensor
    wanted: Tensor

    @property
    def work(self) -> Work:
        rows = len(self.load) * (self.weights[0].shape[0] + self.load.part_bytes // ROW_BYTES)
        local = len(self.load) * self.weights[0].nbytes
        return Work(local, self.load.nbytes, 2.0 * rows * TOKENS * ROW)

    def local(self, part: int) -> None:
        weight = self.weights[part % len(self.weights)]
        torch.mm(self.x, weight.t(), out=self.local_output)

    def ring(self, part: int) -> None:
        torch.mm(self.x, _rows(self.load.held(part)).t(), out=self.outputs[part])

    def alone(self) -> None:
        """All products, whatever is in the ring."""
        for part in range(len(self.load)):
            self.local(part)
            self.ring(part)

    def differing(self) -> str:
        """ "" where all outputs are right."""
        near = torch.isclose(self.outputs, self.wanted, rtol=_TOLERANCE, atol=_TOLERANCE)
        wrong = int((~near).flatten(1).any(dim=1).sum())
        return f"wrong: {wrong} of {len(self.load)} products" if wrong else ""


def make_step(case: FillerCase, local_share: float, ceilings: Ceilings) -> FillerStep:
    """Local rows take GPU memory `local_share` of what a part takes the best link."""
    load = case.load(PART_BYTES, PRODUCTS * PART_BYTES)
    nbytes = local_share * PART_BYTES / ceilings.best_link * ceilings.hbm_stream
    rows = max(128, round(nbytes / ROW_BYTES / 128) * 128)
    kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": case.device}
    x = torch.randn((TOKENS, ROW), **kind)
    weights = tuple(torch.randn((rows, ROW), **kind) for _ in range(_WEIGHTS))
    outputs = torch.empty((len(load), TOKENS, PART_BYTES // ROW_BYTES), **kind)
    parts = case.reference[: load.nbytes].view(len(load), PART_BYTES)
    wanted = torch.stack([torch.mm(x, _rows(part).t()) for part in parts])
    return FillerStep(load, x, weights, torch.empty((TOKENS, rows), **kind), outputs, wanted)


def step_rows(
    case: FillerCase,
    binds: str,
    ceilings: Ceilings,
    shapes: Sequence[StreamerShape],
    rule: TimingRule,
) -> list[dict[str, Any]]:
    """The step by each filler in turn, and its products alone."""
    step = make_step(case, LOCAL_SHARES[binds], ceilings)
    bound = step_bound([step.work], ceilings)
    alone = capture(step.alone, warmup=1)
    fillers = fillers_of(step.load, shapes, case.device)

    def played(filler: Any) -> Callable[[], None]:
        return carried(filler, step.ring, step.local)

    problems = []
    for filler in fillers:
        case.poison()
        step.outputs.fill_(float("nan"))
        problems.append(replay_or_copy(filler, fillers[0], played, step.differing))
    good = [filler for filler, problem in zip(fillers, problems, strict=True) if not problem]
    timings = time_in_turn([alone, *captured_all(good, played)], device=case.device, rule=rule)
    by_filler = dict(zip([filler.name for filler in good], timings[1:], strict=True))
    shared = {"part": "step", "binds": binds, "L_milliseconds": bound * 1e3}
    first = {**shared, "filler": "none", "milliseconds": timings[0].seconds * 1e3, "status": "ok"}
    rows: list[dict[str, Any]] = [first]
    for filler, problem in zip(fillers, problems, strict=True):
        problem = problem or filler.given_up()
        row = {**shared, **columns_of(filler), "status": problem or "ok"}
        if not problem:
            timing = by_filler[filler.name]
            row |= {
                "milliseconds": timing.seconds * 1e3,
                "repeats": timing.repeats,
                "spread": timing.spread,
                "T/L": timing.seconds / bound,
            }
        rows.append(row)
    return rows


def _rows(held: Tensor) -> Tensor:
    """Bytes as rows of a weight."""
    return held.view(torch.bfloat16).view(-1, ROW)
