"""What attention over a tiered cache must reach, as data: which cells a bar covers.

T is the measured time, L the direct bound, C the best backend of torch's attention with the whole
cache resident. Every bar reads "value <= limit"; 1 is the bar itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dak_inductor.benchmarks.harness.record import Verdict

MICROSECOND = 1e-6
MEGABYTE = 10**6
NEARLY_ONE = 1.0 + 1e-9


@dataclass(frozen=True, slots=True)
class AttentionCell:
    """One measured cell, times in seconds."""

    fraction: float
    cache_bytes: int
    seconds: float
    direct: float
    resident: float
    prefill: bool = False


@dataclass(frozen=True, slots=True)
class Bar:
    """T <= limit * reference + slack in every cell of these fractions, both ends included."""

    name: str
    against: Literal["direct", "resident", "the larger"]
    limit: float
    fractions: tuple[float, float]
    slack_seconds: float = 0.0
    prefill: bool = False

    def covers(self, cell: AttentionCell) -> bool:
        inside = self.fractions[0] <= cell.fraction <= self.fractions[1]
        return inside and cell.prefill == self.prefill

    def excess(self, cell: AttentionCell) -> float:
        """Value over limit, above 1 where the bar is missed."""
        reference = {
            "direct": cell.direct,
            "resident": cell.resident,
            "the larger": max(cell.direct, cell.resident),
        }[self.against]
        return cell.seconds / (self.limit * reference + self.slack_seconds)


BARS = (
    Bar("decode: T <= 1.06 L + 8 us", "direct", 1.06, (0.005, 1.0), 8 * MICROSECOND),
    Bar("decode, nothing remote: T <= 1.03 C", "resident", 1.03, (0.0, 0.0)),
    Bar("prefill: T <= 1.15 max(L, C)", "the larger", 1.15, (0.0, 1.0), prefill=True),
)
MEAN_NAME = "decode, caches of 256 MB: geometric mean of T / L <= 1.05"
MEAN_LIMIT = 1.05
MEAN_BYTES = 256 * MEGABYTE


def missed(cell: AttentionCell) -> dict[str, float]:
    """The bars that a cell misses, each with its excess."""
    found = {bar.name: bar.excess(cell) for bar in BARS if bar.covers(cell)}
    return {name: excess for name, excess in found.items() if excess > NEARLY_ONE}


def mean_over_direct(cells: Sequence[AttentionCell]) -> float | None:
    """Geometric mean of T / L over large caches of which a part is remote; None without one."""
    logs = [
        math.log(cell.seconds / cell.direct)
        for cell in cells
        if cell.fraction > 0 and cell.cache_bytes >= MEAN_BYTES and not cell.prefill
    ]
    return math.exp(math.fsum(logs) / len(logs)) if logs else None


def verdicts(cells: Sequence[AttentionCell], *, on_gpu: bool) -> list[Verdict]:
    """One verdict per bar that covers a cell, on its worst one; the geometric mean last."""
    made = []
    for bar in BARS:
        found = [bar.excess(cell) for cell in cells if bar.covers(cell)]
        if found:
            over = sum(excess > NEARLY_ONE for excess in found)
            note = f"worst of {len(found)} cells over its limit; {over} over"
            made.append(
                Verdict(
                    bar.name, max(found), 1.0, "x", over == 0 if on_gpu else None,
                    note if on_gpu else "no GPU",
                )
            )  # fmt: skip
    mean = mean_over_direct(cells)
    if mean is not None:
        made.append(
            Verdict(MEAN_NAME, mean, MEAN_LIMIT, "x", mean <= MEAN_LIMIT if on_gpu else None)
        )
    return made
