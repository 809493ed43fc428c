"""What trials chose, beside what is faster in CUDA graphs, over recorded grids of linears.

A trial times each way alone; in a step a launch of the kernel overlaps its neighbours, for which
`trials.OVERLAP_SECONDS` is taken off. Of each decode cell that the kernel serves, the record has
the time of the stock operator too, so it says what another value would have lost: the regret, time
over the faster of the two less one. Needs no GPU.

    python benchmarks/check_trials.py [RECORD.json ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dak_inductor.benchmarks.harness.record import project_root
from dak_inductor.benchmarks.harness.table import table
from dak_inductor.lowering.linear.trials import OVERLAP_SECONDS

GRIDS = ("linear", "linear_peer")
OVERLAPS = (0.0, 1.0, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0)  # microseconds
STOCK = "stock on split"
COLUMNS = ("record", "overlap_us", "cells", "mean_regret_percent", "over_2_percent", "in_use")
_WRONG = 0.02


@dataclass(frozen=True, slots=True)
class Choice:
    """One cell that the kernel serves: microseconds in trials, and in graphs."""

    kernel_trial: float
    stock_trial: float
    kernel: float
    stock: float

    def regret(self, overlap: float) -> float:
        """With so many microseconds taken off the kernel's trial."""
        taken = self.kernel if self.kernel_trial <= self.stock_trial + overlap else self.stock
        return taken / min(self.kernel, self.stock) - 1


def choices(cells: Iterable[Mapping[str, Any]]) -> list[Choice]:
    found = []
    for cell in cells:
        trial, peers = cell.get("trial_microseconds") or {}, cell.get("peers_microseconds") or {}
        known = cell.get("served_by") == "direct" and {"direct", "stock"} <= set(trial)
        if known and STOCK in peers:
            found.append(
                Choice(trial["direct"], trial["stock"], cell["microseconds"], peers[STOCK])
            )
    return found


def rows(name: str, found: Sequence[Choice]) -> list[dict[str, object]]:
    """One for each overlap tried; none without choices."""
    made: list[dict[str, object]] = []
    for overlap in OVERLAPS if found else ():
        regrets = [choice.regret(overlap) for choice in found]
        made.append(
            {
                "record": name,
                "overlap_us": overlap,
                "cells": len(found),
                "mean_regret_percent": 100 * statistics.mean(regrets),
                "over_2_percent": sum(regret > _WRONG for regret in regrets),
                "in_use": "yes" if abs(overlap - OVERLAP_SECONDS * 1e6) < 1e-9 else "",
            }
        )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(description="What trials chose, beside what was faster")
    made.add_argument("records", nargs="*", type=Path)
    results = project_root() / "benchmarks" / "results"
    paths = made.parse_args(argv).records or [results / f"{name}.json" for name in GRIDS]
    found: list[dict[str, object]] = []
    for path in paths:
        record = json.loads(path.read_text(encoding="utf-8"))
        found += rows(path.stem, choices(record["cells"]))
    print(table(found, COLUMNS))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
