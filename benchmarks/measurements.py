"""The generated parts of docs/measurements.md, and docs/cells_over.md, from the committed records.

    python benchmarks/measurements.py [--write]

Without --write it says whether the pages are as the records have them. Needs no GPU.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from dak_inductor.benchmarks.harness.bar_tables import bars, models, steps
from dak_inductor.benchmarks.harness.cause_tables import (
    beyond_link,
    fits,
    listing,
    over_bound,
    summary,
)
from dak_inductor.benchmarks.harness.grid_record import load
from dak_inductor.benchmarks.harness.record import project_root

GRIDS = (
    "linear", "linear_peer", "linear_prefill", "linear_peer_prefill", "attention", "attention_peer",
)  # fmt: skip
DECODE = ("linear", "linear_peer")
BY_SHARE = {"linear": 16, "linear_peer": 16, "attention": None, "attention_peer": None}
"""Grids whose T - L is shown by share remote, at that many tokens."""
STEPS = (
    "decode_step", "decode_step_16", "decode_step_64", "decode_step_64_low",
    "decode_step_70b", "decode_step_70b_16", "decode_step_70b_16_low", "decode_step_70b_64",
    "decode_step_peer", "decode_step_peer_direct", "prefill_1", "prefill_4",
)  # fmt: skip
MODELS = ("models", "models_opt", "models_encoders", "models_peer")
TOPICS = {
    "system": (
        "planner", "replan", "cost_model", "compile", "move", "load", "pages", "over_budget",
        "marks", "soak", "soak_threads", "models_quick", "host",
    ),
    "linears": (*GRIDS[:4], "linear_early", "few_rows", "few_rows_more"),
    "attention": (*GRIDS[4:], "long_context"),
    "steps": (*STEPS, "window", "fillers"),
    "models": MODELS,
}  # fmt: skip
PAGE, CELLS_PAGE = "measurements.md", "cells_over.md"
GENERATED = re.compile(r"(<!-- generated: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
_CELLS_HEAD = """# Cells over their bars

All of them, by record and cause, written by `python benchmarks/measurements.py --write`. What the
causes mean, and what was tried, is [measurements.md](measurements.md). An entry of a linear is M,
the value over its limit, and in brackets T - L in us and what served it where that was not our
kernel; an entry of attention is the share that is remote, with the same.
"""


def blocks(results: Path) -> dict[str, str]:
    """The generated parts, by name."""
    grids = {name: load(results / f"{name}.json") for name in GRIDS}
    decode = [grids[name] for name in DECODE]
    return {
        **{f"bars of {topic}": bars(results, names) for topic, names in TOPICS.items()},
        **{f"causes in {name}": summary(grid) for name, grid in grids.items()},
        **{
            f"T - L in {name}": over_bound(grids[name], tokens) for name, tokens in BY_SHARE.items()
        },
        "fits": fits(decode[:1]),
        "beyond the link": beyond_link(decode),
        "steps": steps(results, STEPS),
        "models": models(results, MODELS),
    }


def filled(page: str, parts: Mapping[str, str]) -> str:
    """`page` with its blocks as `parts` has them; KeyError for a block of another name."""
    return GENERATED.sub(lambda found: f"{found[1]}\n{parts[found[2]]}\n\n{found[3]}", page)


def cells_page(results: Path) -> str:
    parts = [f"## {name}\n\n{listing(load(results / f'{name}.json'))}\n" for name in GRIDS]
    return "\n".join([_CELLS_HEAD, *parts])


def main(argv: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    made.add_argument("--write", action="store_true", help="write the pages")
    write = made.parse_args(argv).write
    root = project_root()
    results, docs = root / "benchmarks" / "results", root / "docs"
    page = (docs / PAGE).read_text(encoding="utf-8")
    wanted = {PAGE: filled(page, blocks(results)), CELLS_PAGE: cells_page(results)}
    stale = [
        name
        for name, text in wanted.items()
        if not (docs / name).exists() or (docs / name).read_text(encoding="utf-8") != text
    ]
    for name in stale:
        print(f"docs/{name}: {'written' if write else 'not as the records have it'}")
        if write:
            (docs / name).write_text(wanted[name], encoding="utf-8")
    return 1 if stale and not write else 0


if __name__ == "__main__":
    raise SystemExit(main())
