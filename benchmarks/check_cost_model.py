"""Times that the planner's cost model predicts, beside those of recorded grids and steps.

Each cell of a grid is one operator; its prediction is `cost_model.op_time` and `both_seconds` on
the shipped profile with the ceilings of the record's own run. The bars are those wanted of whole
steps. Of a step the plan predicts the products, in CUDA graphs; what else there is in it is the
time with everything resident less the products then, which no plan changes. Needs no GPU.

    python benchmarks/check_cost_model.py [RECORD.json ...] [--out DIR]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dak_inductor import hardware
from dak_inductor.benchmarks.harness import attention_grid, command_line
from dak_inductor.benchmarks.harness.linear_bars import LAST_DECODE
from dak_inductor.benchmarks.harness.models import SHAPES
from dak_inductor.benchmarks.harness.record import Verdict, make_record, project_root
from dak_inductor.cost_model import both_seconds, op_time
from dak_inductor.hardware_profile import HardwareProfile
from dak_inductor.lowering.element_types import ELEMENT_BYTES
from dak_inductor.plan import OpUse

GRIDS = ("linear", "linear_prefill", "linear_peer", "linear_peer_prefill", "attention",
         "attention_peer")  # fmt: skip
STEPS = ("decode_step", "decode_step_16", "decode_step_64", "decode_step_70b", "decode_step_peer",
         "prefill_1", "prefill_4")  # fmt: skip
MEDIAN_BAR, WORST_BAR = 0.03, 0.10
RESIDENT, OURS = "resident inductor", "dak"
COLUMNS = ("record", "phase", "remote", "cells", "median", "bias", "worst", "worst cell")
_BANDS = ((0.0, "0"), (0.01, "to 1%"), (0.1, "to 10%"), (1.0, "more"))


@dataclass(frozen=True, slots=True)
class Compared:
    """One cell. `error` is predicted / measured - 1."""

    record: str
    phase: str
    remote: str
    error: float
    cell: str


def profile_of(record: Mapping[str, Any]) -> HardwareProfile:
    """The shipped profile of the H200 with the ceilings of a record's run."""
    shipped, found = hardware.load("h200"), record["ceilings"]
    links = {
        tier: dataclasses.replace(
            link, direct_bandwidth=found["link_direct"], copy_bandwidth=found["link_copy"]
        )
        for tier, link in shipped.links.items()
    }
    return dataclasses.replace(
        shipped,
        hbm_bandwidth=found["hbm_stream"],
        matmul_flops=dict.fromkeys(shipped.matmul_flops, found["matmul_flops"]),
        links=links,
    )


def linear_use(cell: Mapping[str, Any]) -> OpUse:
    """The planner's view of a cell of `bench_linear`."""
    m, n, k = cell["M"], cell["N"], cell["K"]
    return OpUse(
        op="linear", graph="", tensor="weight", kind="linear", touched_bytes=cell["weight_bytes"],
        other_bytes=ELEMENT_BYTES * m * (n + k), flops=2.0 * m * n * k, calls=1, m=m,
    )  # fmt: skip


def attention_use(cell: Mapping[str, Any]) -> OpUse:
    """The planner's view of a cell of `bench_attention`."""
    (shape,) = attention_grid.parse_shapes(cell["shape"])
    rows = shape.batch * shape.kv_heads * shape.ratio * shape.queries
    return OpUse(
        op="attention", graph="", tensor="cache", kind="attention",
        touched_bytes=cell["cache_bytes"], flops=shape.flops, calls=1,
        other_bytes=2.0 * ELEMENT_BYTES * rows * shape.head_dim,
    )  # fmt: skip


def compare(name: str, record: Mapping[str, Any]) -> list[Compared]:
    """All cells of a grid that were measured."""
    profile, found = profile_of(record), []
    attention = name.startswith("attention")
    for cell in record["cells"]:
        if cell["status"] == "failed":
            continue
        use = attention_use(cell) if attention else linear_use(cell)
        link = profile.link(cell["remote"])
        known = (use, cell["realised"], profile, link)
        seconds = op_time(*known) + both_seconds(*known)
        queries = attention_grid.parse_shapes(cell["shape"])[0].queries if attention else cell["M"]
        most = attention_grid.MOST_DECODE_QUERIES if attention else LAST_DECODE
        place = f"{cell['shape']} {cell['fraction']}" + ("" if attention else f" M={cell['M']}")
        found.append(
            Compared(
                name, "decode" if queries <= most else "prefill", _band(cell["fraction"]),
                seconds * 1e6 / cell["microseconds"] - 1, place,
            )
        )  # fmt: skip
    return found


def compare_steps(name: str, record: Mapping[str, Any]) -> list[Compared]:
    """All steps of ours whose products have a prediction; none of a record that lacks them, or the
    step with everything resident."""
    resident = [c for c in record["cells"] if c["provider"] == RESIDENT and c["status"] == "ok"]
    ours = [
        cell
        for cell in record["cells"]
        if cell["provider"] == OURS and cell["status"] == "ok" and "products_milliseconds" in cell
    ]
    if not resident or not ours:
        return []
    profile, phase = profile_of(record), "prefill" if record["arguments"]["prefill"] else "decode"
    products = sum(
        op_time(use, 0.0, profile, profile.link(ours[0]["remote"]))
        for use in step_uses(record["arguments"])
    )
    other = resident[0]["milliseconds"] - products * 1e3
    return [
        Compared(
            name, f"{phase} step", _band(cell["fraction"]),
            (cell["products_milliseconds"] + other) / cell["milliseconds"] - 1,
            f"{name} {cell['fraction']}",
        )
        for cell in ours
    ]  # fmt: skip


def step_uses(arguments: Mapping[str, Any]) -> list[OpUse]:
    """The products of a step of `bench_step`; gate and up are one."""
    shapes = dict(SHAPES[arguments["shape"]].linear_shapes())
    rows, columns = shapes.pop("up")
    shapes["gate"] = (2 * rows, columns)
    m = arguments["batch"] * (arguments["context"] if arguments["prefill"] else 1)
    uses = [
        linear_use({"M": m, "N": n, "K": k, "weight_bytes": ELEMENT_BYTES * n * k})
        for n, k in shapes.values()
    ]
    return uses * arguments["layers"]


def _band(fraction: float) -> str:
    return next(text for largest, text in _BANDS if fraction <= largest)


def rows(compared: Iterable[Compared]) -> list[dict[str, object]]:
    """A line for each record, phase and band of remote fractions; errors in per cent."""
    groups: dict[tuple[str, str, str], list[Compared]] = {}
    for each in compared:
        groups.setdefault((each.record, each.phase, each.remote), []).append(each)
    made: list[dict[str, object]] = []
    for (record, phase, remote), cells in groups.items():
        worst = max(cells, key=lambda each: abs(each.error))
        made.append(
            {
                "record": record, "phase": phase, "remote": remote, "cells": len(cells),
                "median": 100 * statistics.median(abs(each.error) for each in cells),
                "bias": 100 * statistics.median(each.error for each in cells),
                "worst": 100 * worst.error, "worst cell": worst.cell,
            }
        )  # fmt: skip
    return made


def verdicts(compared: Sequence[Compared]) -> list[Verdict]:
    """Of all operators together, and of all steps."""
    found = []
    for ending, wanted in (("", False), (", steps", True)):
        errors = [abs(each.error) for each in compared if each.phase.endswith("step") == wanted]
        if errors:
            median, worst = statistics.median(errors), max(errors)
            found += [
                Verdict(f"median error{ending}", median, MEDIAN_BAR, "share", median <= MEDIAN_BAR),
                Verdict(f"worst error{ending}", worst, WORST_BAR, "share", worst <= WORST_BAR),
            ]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    results = project_root() / "benchmarks" / "results"
    made.add_argument(
        "records", nargs="*", type=Path,
        default=[results / f"{name}.json" for name in (*GRIDS, *STEPS)],
    )  # fmt: skip
    made.add_argument("--out", type=Path, default=Path("benchmark-results"))
    arguments = made.parse_args(argv)
    compared: list[Compared] = []
    for path in arguments.records:
        record = json.loads(path.read_text(encoding="utf-8"))
        name = str(record["benchmark"])
        if name.startswith(("linear", "attention")):
            compared += compare(name, record)
        elif name.startswith(("decode_step", "prefill_")):
            compared += compare_steps(name, record)
        else:
            raise SystemExit(f"{path} is no grid of linears or attention, and no record of steps")
    result = make_record(
        "cost_model",
        arguments={"records": [path.name for path in arguments.records]},
        cells=rows(compared),
        verdicts=verdicts(compared),
        notes=["errors in per cent; bias is the median of predicted / measured - 1"],
    )
    return command_line.finish(result, COLUMNS, arguments.out)


if __name__ == "__main__":
    raise SystemExit(main())
