"""A recorded grid, read back: its cells, those beside them, and what their bytes alone would take.

Times are in microseconds, as the records have them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Cell = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class GridRecord:
    """A record of `bench_linear` or `bench_attention`."""

    name: str
    cells: tuple[Cell, ...]
    ceilings: Mapping[str, Any]

    @property
    def attention(self) -> bool:
        return self.name.startswith("attention")

    def local(self, cell: Cell) -> float:
        """What its local bytes take from HBM at the ceiling of the run."""
        whole = cell["cache_bytes" if self.attention else "weight_bytes"]
        return float((whole - cell["remote_bytes"]) / self.ceilings["hbm_stream"] * 1e6)

    def remote(self, cell: Cell) -> float:
        """What its remote bytes take over the link by direct reads."""
        return float(cell["remote_bytes"] / self.ceilings["link_direct"] * 1e6)

    def copied(self, cell: Cell) -> float:
        """What they take a copy engine."""
        return float(cell["remote_bytes"] / self.ceilings["link_copy"] * 1e6)

    def without_remote(self, cell: Cell) -> float:
        """The time of the cell beside it with nothing remote; 0 where that was not measured."""
        return next(
            (
                float(other["microseconds"])
                for other in self.cells
                if other["fraction"] == 0.0
                and other["shape"] == cell["shape"]
                and other.get("M") == cell.get("M")
            ),
            0.0,
        )


@dataclass(frozen=True, slots=True)
class Missed:
    """A cell and a bar that it misses; `excess` is its value over the limit."""

    cell: Cell
    bar: str
    excess: float

    @property
    def limit(self) -> float:
        """The time that would meet the bar."""
        return float(self.cell["microseconds"]) / self.excess

    @property
    def over_bound(self) -> float:
        """T - L."""
        return float(self.cell["microseconds"] - self.cell["L_microseconds"])

    @property
    def over_resident(self) -> float:
        """T - C."""
        return float(self.cell["microseconds"] - self.cell["C_microseconds"])

    @property
    def once_met(self) -> bool:
        """Whether the fastest repeat meets the bar."""
        return float(min(self.cell["repeats_microseconds"])) <= self.limit


def load(path: Path) -> GridRecord:
    found = json.loads(path.read_text(encoding="utf-8"))
    cells = tuple(cell for cell in found["cells"] if cell["status"] != "failed")
    return GridRecord(path.stem, cells, found["ceilings"])


def missed(grid: GridRecord) -> Iterator[Missed]:
    """Every cell over a bar, once for each bar."""
    for cell in grid.cells:
        for bar, excess in cell["over"].items():
            yield Missed(cell, bar, excess)
