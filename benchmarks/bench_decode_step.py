"""A decode step of Llama-3-8B-shaped layers in a CUDA graph: `dak` against every peer, same run.

Bar: `dak` takes at most 1.03 times the stock kernels on the same share of split tensors, the
faster of their two forms (eager, under Inductor) at every fraction, and 1.03 times the faster of
its own two strategies, direct reads and copies ahead.

    python benchmarks/bench_decode_step.py --out DIR [--layers 8] [--fractions 0.1,0.5] [--batch 1]
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Mapping, Sequence

import torch

from dak_inductor.benchmarks.harness import ceilings, command_line
from dak_inductor.benchmarks.harness.comparison import compare, make_reference
from dak_inductor.benchmarks.harness.models import LLAMA3_8B, TINY, Workload
from dak_inductor.benchmarks.harness.peers import all_providers
from dak_inductor.benchmarks.harness.peers.provider import Setting
from dak_inductor.benchmarks.harness.record import Record, Verdict, make_record
from dak_inductor.benchmarks.harness.timing import rotation_count

BAR = 1.03
BAR_PEERS = ("split eager", "split inductor")
STRATEGIES = ("dak direct", "dak staged")
COLUMNS = (
    "provider", "kind", "fraction", "realised", "milliseconds", "T/L", "accurate", "status", "note",
)  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = command_line.parser(__doc__.splitlines()[0] if __doc__ else "")
    made.add_argument("--layers", type=int, default=8)
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--context", type=int, default=512)
    made.add_argument("--fractions", type=command_line.fractions, default=(0.1, 0.5))
    made.add_argument(
        "--shape", choices=("llama3-8b", "tiny"), default=command_line.default_shape()
    )
    made.add_argument("--peers", default="all", help="comma-separated provider names, or all")
    made.add_argument("--seconds-per-row", type=float, default=None, help="measured time of each")
    made.add_argument("--limit-seconds", type=float, default=None, help="begin no row after that")
    return made.parse_args(argv)


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


def verdicts(
    rows: Sequence[Mapping[str, object]], fractions: Sequence[float], *, on_gpu: bool
) -> list[Verdict]:
    """`dak` over the faster form of stock kernels on split tensors, and over the faster of its own
    strategies where both were measured, at each fraction."""
    made = []
    for fraction in fractions:
        at = {
            row["provider"]: row
            for row in rows
            if row["fraction"] == fraction and row["status"] == "ok"
        }
        times = {name: float(str(at[name]["milliseconds"])) for name in BAR_PEERS if name in at}
        name = f"dak / stock on split, {fraction:.0%} remote"
        if "dak" not in at or not times:
            missing = "dak" if "dak" not in at else "stock on split"
            made.append(Verdict(name, None, BAR, "x", False, f"no accurate row of {missing}"))
            continue
        ours = float(str(at["dak"]["milliseconds"]))
        against = "; ".join(f"{peer}: {ours / time:.3f}x" for peer, time in times.items())
        ratio = ours / min(times.values())
        passed = ratio <= BAR if on_gpu else None
        made.append(Verdict(name, ratio, BAR, "x", passed, against if on_gpu else "no GPU"))
        own = {name: float(str(at[name]["milliseconds"])) for name in STRATEGIES if name in at}
        if len(own) == len(STRATEGIES):
            name = f"dak / its faster strategy, {fraction:.0%} remote"
            ratio = ours / min(own.values())
            passed = ratio <= BAR if on_gpu else None
            against = "; ".join(f"{each}: {ours / time:.3f}x" for each, time in own.items())
            made.append(Verdict(name, ratio, BAR, "x", passed, against if on_gpu else "no GPU"))
    return made


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.quick:
        arguments.layers = min(arguments.layers, 4)
    deadline = time.perf_counter() + (arguments.limit_seconds or math.inf)
    device, rule = command_line.default_device(), command_line.timing_rule(arguments)
    if arguments.seconds_per_row:
        rule = dataclasses.replace(rule, target_seconds=arguments.seconds_per_row)
    shape = TINY if arguments.shape == "tiny" else LLAMA3_8B
    workload = Workload(shape=shape, batch=arguments.batch, context=arguments.context)
    workload = workload.with_layers(arguments.layers)
    names, providers = chosen_providers(arguments.peers), all_providers()
    settings = [
        Setting(workload, device, fraction, arguments.remote, arguments.host_memory)
        for fraction in arguments.fractions
    ]
    found = ceilings.measure(device, arguments.remote, rule, host_memory=arguments.host_memory)
    reference = make_reference(settings[0])
    rows: list[dict[str, object]] = []
    notes = ["T/L of a reference is against its own bound, all bytes in HBM"]
    if device.type == "cuda":
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        if rotation_count(workload.linear_bytes, l2_bytes) > 1:
            notes.append("the weights of a step fit in a few L2 sizes: the cache is measured too")

    def record() -> Record:
        """What there is so far."""
        return make_record(
            "decode_step",
            arguments=command_line.arguments_dict(arguments),
            cells=[{"note": row.get("reason", ""), **row} for row in rows],
            verdicts=verdicts(rows, arguments.fractions, on_gpu=device.type == "cuda"),
            ceilings=found.as_dict(),
            notes=notes,
            commit=arguments.commit,
        )

    for index, setting in enumerate(settings):
        for name in names:
            if index and providers[name].kind == "reference":
                continue  # all resident knows no fraction
            if time.perf_counter() > deadline:
                notes.append(f"time limit: {name} at {setting.fraction} was left out")
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
