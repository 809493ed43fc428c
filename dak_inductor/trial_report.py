"""What was measured to choose the ways of products, as a table."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from dak_inductor.lowering.linear import trials
from dak_inductor.lowering.linear.trials import Trial


def trials_of(device: torch.device, tier: str) -> tuple[Trial, ...]:
    """Those of products with weights divided between that GPU and `tier`, of any model."""
    if device.type != "cuda":
        return ()
    index = device.index or 0
    return tuple(
        trial
        for trial in trials.results()
        if (trial.call.device_index, trial.call.tier) == (index, tier)
    )


def render(found: Iterable[Trial]) -> Table:
    """A table for a rich console; a row for each trial."""
    table = Table(
        title="measured products", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for name in ("product", "measured", "taken"):
        table.add_column(name, overflow="fold")
    for trial in found:
        table.add_row(*(Text(cell) for cell in (str(trial.call), trial.times, trial.taken)))
    return table
