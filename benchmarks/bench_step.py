"""A step of Llama-3-shaped layers in a CUDA graph, decode or prefill: `dak` against every peer.

Bars are those of `harness/step_bars`: stock kernels on the same share of split tensors, the fastest
real peer and oracle, its own two strategies, and the bound.

    python benchmarks/bench_step.py --out DIR [--layers 8] [--fractions 0.1,0.5] [--batch 1]
        [--shape llama3-70b] [--prefill] [--record decode_step_70b]
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Sequence

import torch

from dak_inductor.benchmarks.harness import ceilings, command_line, step_options
from dak_inductor.benchmarks.harness.comparison import compare, make_reference
from dak_inductor.benchmarks.harness.peers import all_providers
from dak_inductor.benchmarks.harness.record import Record, Verdict, make_record
from dak_inductor.benchmarks.harness.step_bars import verdicts
from dak_inductor.benchmarks.harness.timing import rotation_count

COLUMNS = (
    "provider", "kind", "fraction", "realised", "milliseconds", "T/L", "accurate", "status", "note",
)  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = command_line.parser(__doc__.splitlines()[0] if __doc__ else "")
    step_options.add(made)
    made.add_argument(
        "--prefill", action="store_true", help="a step of all tokens of the context instead"
    )
    made.add_argument("--fractions", type=command_line.fractions, default=(0.1, 0.5))
    made.add_argument("--record", default=None, help="name of the JSON record")
    made.add_argument("--peers", default="all", help="comma-separated provider names, or all")
    made.add_argument("--seconds-per-row", type=float, default=None, help="measured time of each")
    made.add_argument("--limit-seconds", type=float, default=None, help="begin no row after that")
    arguments = step_options.parse(made, argv)
    arguments.record = arguments.record or f"{'prefill' if arguments.prefill else 'decode'}_step"
    return arguments


def chosen_providers(peers: str) -> list[str]:
    """Names from `--peers`; an unknown one is an error that lists those there are."""
    known = list(all_providers())
    if peers == "all":
        return known
    names = [name.strip() for name in peers.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"unknown peers {unknown}; there are {known}")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    deadline = time.perf_counter() + (arguments.limit_seconds or math.inf)
    device, rule = command_line.default_device(), command_line.timing_rule(arguments)
    if arguments.seconds_per_row:
        rule = dataclasses.replace(rule, target_seconds=arguments.seconds_per_row)
    names, providers = chosen_providers(arguments.peers), all_providers()
    settings = [
        step_options.setting_of(arguments, device, fraction, prefill=arguments.prefill)
        for fraction in arguments.fractions
    ]
    found = ceilings.measure(device, arguments.remote, rule, host_memory=arguments.host_memory)
    reference = make_reference(settings[0])
    rows: list[dict[str, object]] = []
    left: list[str] = []
    notes = ["T/L of a reference is against its own bound, all bytes in HBM"]
    if device.type == "cuda":
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        if rotation_count(settings[0].workload.linear_bytes, l2_bytes) > 1:
            notes.append("the weights of a step fit in a few L2 sizes: the cache is measured too")

    def record() -> Record:
        """What there is so far. A row that was left out has passed nothing."""
        on_gpu = device.type == "cuda"
        made = verdicts(rows, arguments.fractions, on_gpu=on_gpu, prefill=arguments.prefill)
        made.append(Verdict("rows left out", len(left), 0, "rows", not left, "; ".join(left[:3])))
        return make_record(
            arguments.record,
            arguments=command_line.arguments_dict(arguments),
            cells=[{"note": row.get("reason", ""), **row} for row in rows],
            verdicts=made,
            ceilings=found.as_dict(),
            notes=notes,
            commit=arguments.commit,
        )

    for index, setting in enumerate(settings):
        for name in names:
            if index and providers[name].kind == "reference":
                continue  # all resident knows no fraction
            if time.perf_counter() > deadline:
                left.append(f"{name} at {setting.fraction}")
                notes.append(f"time limit: {left[-1]} was left out")
                continue
            row = compare(providers[name], setting, reference, found, rule)
            rows.append(row)
            print(
                f"{setting.fraction:<6} {name:32} {row.get('milliseconds', row.get('reason'))}",
                file=sys.stderr,
                flush=True,
            )
            record().write(arguments.out)
    return command_line.finish(record(), COLUMNS, arguments.out)


if __name__ == "__main__":
    raise SystemExit(main())
