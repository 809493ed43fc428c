"""Times that the planner's cost model predicts, beside those of recorded grids and steps.

Each cell of a grid is one operator; its prediction is `cost_model.op_time` and `both_seconds` on
the shipped profile with HBM and link as in the record's own run. The matmul rate is the profile's:
that of a run is from 667 to 822 TFLOP/s, as warm as the card was, and products in the middle of a
step do not follow it. The bars are those wanted of whole steps, which are planned from their graphs
as `dak plan` does and compared with what CUDA graphs took. Needs no GPU.

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
from dak_inductor.benchmarks.harness.record import Verdict, make_record, project_root
from dak_inductor.benchmarks.harness.step_prediction import predicted_steps
from dak_inductor.cost_model import both_seconds, op_time
from dak_inductor.hardware_profile import HardwareProfile
from dak_inductor.lowering.element_types import ELEMENT_BYTES
from dak_inductor.plan import OpUse

GRIDS = ("linear", "linear_prefill", "linear_peer", "linear_peer_prefill", "attention",
         "attention_peer")  # fmt: skip
STEPS = ("decode_step", "decode_step_16", "decode_step_64",
         "decode_step_64_low", "decode_step_70b", "decode_step_70b_16", "decode_step_70b_16_low",
         "decode_step_70b_64", "decode_step_peer", "prefill_1", "prefill_4")  # fmt: skip
_ASKED = ("shape", "layers", "batch", "context", "prefill")  # of bench_step
MEDIAN_BAR, WORST_BAR = 0.03, 0.10
MODELS = ("models", "models_opt", "models_encoders", "models_peer")
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
    """The shipped profile of the H200 with HBM and link as in a record's run."""
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
        links=links,
    )


def linear_use(cell: Mapping[str, Any]) -> OpUse:
    """The planner's view of a cell of `bench_linear`."""
    m, n, k = cell["M"], cell["N"], cell["K"]
    return OpUse(
        op="linear", graph="", tensor="weight", kind="linear", touched_bytes=cell["weight_bytes"],
        other_bytes=ELEMENT_BYTES * m * (n + k), flops=2.0 * m * n * k, calls=1, m=m, n=n,
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


def newest_steps(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Records of `bench_step` by name, without cells that a later one has again: this package's
    steps were other ones then."""
    latest: dict[tuple[object, ...], str] = {}
    for name, record in sorted(records.items(), key=lambda entry: str(entry[1]["date"])):
        latest |= {_setting(record, cell): name for cell in record["cells"]}
    return {
        name: {
            **record,
            "cells": [c for c in record["cells"] if latest[_setting(record, c)] == name],
        }
        for name, record in records.items()
    }


def _setting(record: Mapping[str, Any], cell: Mapping[str, Any]) -> tuple[object, ...]:
    asked = record["arguments"]
    return (*(asked[n] for n in _ASKED), cell["remote"], cell["fraction"], cell["provider"])


def compare_steps(name: str, record: Mapping[str, Any]) -> list[Compared]:
    """All steps of ours that were measured in CUDA graphs."""
    return [
        Compared(
            name, f"{step.phase} step", _band(step.share), step.predicted / step.measured - 1,
            step.cell,
        )
        for step in predicted_steps(record, profile_of(record))
    ]  # fmt: skip


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
    """Of all operators together, of all steps of decoder blocks, and of those of whole models."""
    found = []
    for ending, wanted in (
        ("", lambda each: not each.phase.endswith("step")),
        (", steps", lambda each: each.phase.endswith("step") and each.record not in MODELS),
        (", whole models", lambda each: each.record in MODELS),
    ):
        errors = [abs(each.error) for each in filter(wanted, compared)]
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
        default=[results / f"{name}.json" for name in (*GRIDS, *STEPS, *MODELS)],
    )  # fmt: skip
    made.add_argument("--out", type=Path, default=Path("benchmark-results"))
    arguments = made.parse_args(argv)
    compared: list[Compared] = []
    steps: dict[str, Mapping[str, Any]] = {}
    for path in arguments.records:
        record = json.loads(path.read_text(encoding="utf-8"))
        name = path.stem
        if name in GRIDS:
            compared += compare(name, record)
        elif name in MODELS:
            compared += compare_steps(name, record)
        elif set(_ASKED) <= record.get("arguments", {}).keys():
            steps[name] = record
        else:
            raise SystemExit(f"{path} is no grid of linears or attention, and no record of steps")
    for name, record in newest_steps(steps).items():
        compared += compare_steps(name, record)
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
