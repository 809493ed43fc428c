"""What a linear on a tiered weight must reach, as data: which cells a bar covers, and its limit.

T is the measured time, L the direct bound, C the stock kernel with the whole weight resident.
Every bar reads "value <= limit"; `Bar.excess` is value / limit, so that 1 is the bar itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dak_inductor.benchmarks.harness.record import Verdict

Against = Literal["direct", "resident", "larger of both", "local bytes", "link bytes"]
MICROSECOND = 1e-6
MEGABYTE = 10**6
LAST_DECODE = 128
LAST_TOKENS = 1 << 40
NEARLY_ONE = 1.0 + 1e-9


@dataclass(frozen=True, slots=True)
class LinearCell:
    """One measured cell, times in seconds.

    `local_seconds` is what its local bytes take at the HBM ceiling; `amplification` counted remote
    bytes over remote bytes, None where nothing was counted or nothing is remote.
    """

    tokens: int
    fraction: float
    weight_bytes: int
    seconds: float
    direct: float
    resident: float
    local_seconds: float
    amplification: float | None


@dataclass(frozen=True, slots=True)
class Coverage:
    """Which cells: token counts, remote fractions (both ends included), weights of that size."""

    tokens: tuple[int, int]
    fractions: tuple[float, float]
    weight_bytes: int = 0

    def covers(self, tokens: int, fraction: float, weight_bytes: int) -> bool:
        return (
            self.tokens[0] <= tokens <= self.tokens[1]
            and self.fractions[0] <= fraction <= self.fractions[1]
            and weight_bytes >= self.weight_bytes
        )


@dataclass(frozen=True, slots=True)
class Bar:
    """T <= limit * reference + slack in every cell covered ("link bytes": amplification <= limit).

    A required share s of the HBM ceiling is the limit 1 / s against the time of the local bytes.
    """

    name: str
    against: Against
    limit: float
    coverage: Coverage
    slack_seconds: float = 0.0

    def covers(self, cell: LinearCell) -> bool:
        return self.coverage.covers(cell.tokens, cell.fraction, cell.weight_bytes)

    def excess(self, cell: LinearCell) -> float | None:
        """Value over limit, above 1 where the bar is missed; None where nothing was counted."""
        if self.against == "link bytes":
            return None if cell.amplification is None else cell.amplification / self.limit
        reference = {
            "direct": cell.direct,
            "resident": cell.resident,
            "larger of both": max(cell.direct, cell.resident),
            "local bytes": cell.local_seconds,
        }[self.against]
        return cell.seconds / (self.limit * reference + self.slack_seconds)


@dataclass(frozen=True, slots=True)
class MeanBar:
    """Geometric mean of T / L over the cells covered <= limit."""

    name: str
    limit: float
    coverage: Coverage

    def value(self, cells: Sequence[LinearCell]) -> float | None:
        """None where no cell is covered."""
        logs = [
            math.log(cell.seconds / cell.direct)
            for cell in cells
            if self.coverage.covers(cell.tokens, cell.fraction, cell.weight_bytes)
        ]
        return math.exp(math.fsum(logs) / len(logs)) if logs else None


_REMOTE = (0.005, 1.0)
_RESIDENT = (0.0, 0.0)
_PREFILL = (LAST_DECODE + 1, LAST_TOKENS)
_SLACK = 4 * MICROSECOND

BARS: tuple[Bar, ...] = (
    Bar(
        "decode, M <= 32: T <= 1.05 L + 4 us",
        "direct", 1.05, Coverage((1, 32), _REMOTE, 16 * MEGABYTE), _SLACK,
    ),
    Bar(
        "decode, M <= 64: T <= 1.08 L + 4 us",
        "direct", 1.08, Coverage((33, 64), _REMOTE, 16 * MEGABYTE), _SLACK,
    ),
    Bar(
        "decode, M <= 128: T <= 1.15 L + 4 us",
        "direct", 1.15, Coverage((65, LAST_DECODE), _REMOTE, 16 * MEGABYTE), _SLACK,
    ),
    Bar("nothing remote: T <= 1.02 C", "resident", 1.02, Coverage((1, LAST_TOKENS), _RESIDENT)),
    Bar(
        "nothing remote, M <= 32: HBM >= 92%",
        "local bytes", 1 / 0.92, Coverage((1, 32), _RESIDENT, 200 * MEGABYTE),
    ),
    Bar(
        "nothing remote, M <= 64: HBM >= 90%",
        "local bytes", 1 / 0.90, Coverage((33, 64), _RESIDENT, 200 * MEGABYTE),
    ),
    Bar(
        "nothing remote, M <= 128: HBM >= 85%",
        "local bytes", 1 / 0.85, Coverage((65, LAST_DECODE), _RESIDENT, 200 * MEGABYTE),
    ),
    Bar(
        "prefill, 1% remote or less: T <= 1.08 C",
        "resident", 1.08, Coverage(_PREFILL, (1e-9, 0.01)),
    ),
    Bar(
        "prefill, 2% remote or more: T <= 1.10 max(L, C)",
        "larger of both", 1.10, Coverage(_PREFILL, (0.02, 1.0)),
    ),
    Bar(
        "prefill, 2% remote or more: link amplification <= 1.05",
        "link bytes", 1.05, Coverage(_PREFILL, (0.02, 1.0)),
    ),
)  # fmt: skip
MEAN_BAR = MeanBar(
    "decode, M <= 32, weights of 200 MB: geometric mean of T / L <= 1.04",
    1.04,
    Coverage((1, 32), _REMOTE, 200 * MEGABYTE),
)


def missed(cell: LinearCell) -> list[tuple[Bar, float]]:
    """The bars that a cell misses, each with its excess (infinite where nothing was counted)."""
    made = []
    for bar in BARS:
        if bar.covers(cell):
            excess = bar.excess(cell)
            if excess is None or excess > NEARLY_ONE:
                made.append((bar, math.inf if excess is None else excess))
    return made


def verdicts(cells: Sequence[LinearCell], *, on_gpu: bool) -> list[Verdict]:
    """One verdict per bar that covers a cell, on its worst one; the geometric mean last."""
    made = []
    for bar in BARS:
        covered = [cell for cell in cells if bar.covers(cell)]
        if not covered:
            continue
        found = [bar.excess(cell) for cell in covered]
        counted = [excess for excess in found if excess is not None]
        over = sum(excess is None or excess > NEARLY_ONE for excess in found)
        note = f"worst of {len(covered)} cells over its limit; {over} over"
        if len(counted) < len(found):
            note += f", {len(found) - len(counted)} not counted"
        made.append(
            Verdict(
                bar.name, max(counted, default=None), 1.0, "x", over == 0 if on_gpu else None,
                note if on_gpu else "no GPU",
            )
        )  # fmt: skip
    mean = MEAN_BAR.value(cells)
    if mean is not None:
        passed = mean <= MEAN_BAR.limit if on_gpu else None
        made.append(Verdict(MEAN_BAR.name, mean, MEAN_BAR.limit, "x", passed))
    return made
