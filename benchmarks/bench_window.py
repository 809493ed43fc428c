"""The window of a link that kernels adapt themselves, beside fixed ones.

From starts between a quarter of the floor and 16 times the knee: rates of the link and of GPU
memory, launch by launch. Beside a copy of 1 GB over the same link. Beside a second process that
copies.

    python benchmarks/bench_window.py --out DIR [--seconds 45] [--remote cuda:1]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from dak_inductor.benchmarks.harness import ceilings, command_line
from dak_inductor.benchmarks.harness.clock import Clock
from dak_inductor.benchmarks.harness.record import make_record
from dak_inductor.benchmarks.harness.table import summary
from dak_inductor.benchmarks.harness.timing import QUICK
from dak_inductor.benchmarks.harness.window_case import (
    Product,
    Setting,
    all_local,
    make_products,
    profile_limits,
    run_beside_copy,
    run_series,
    settled,
)
from dak_inductor.benchmarks.harness.window_rows import (
    CHANGES,
    COLUMNS,
    SETTLED_AT,
    best_fixed_verdicts,
    copy_rows,
    copy_verdicts,
    row,
    start_verdicts,
    window_history,
)
from dak_inductor.cuda_runtime.tiers import open_tier
from dak_inductor.cuda_runtime.window import default_window, window_of
from dak_inductor.lowering.linear.trials import TRIALS

LAUNCHES = 40
COPY_BYTES = 10**9
PROCESS_SECONDS = 8.0

_SECOND_PROCESS = """
import sys, time, torch
remote, seconds = sys.argv[1], float(sys.argv[2])
where = dict(pin_memory=True) if remote == "cpu" else dict(device=remote)
source = torch.empty(256 << 20, dtype=torch.uint8, **where)
target = torch.empty(256 << 20, dtype=torch.uint8, device="cuda:0")
target.copy_(source)
torch.cuda.synchronize()
print("ready", flush=True)
end, copied = time.time() + seconds, 0
while time.time() < end:
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    copied += source.nbytes
print(copied / seconds, flush=True)
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = command_line.parser("Windows that kernels adapt, beside fixed ones")
    made.add_argument("--seconds", type=float, default=45.0, help="after which no cell is begun")
    made.add_argument("--launches", type=int, default=LAUNCHES, help="of each series")
    return made.parse_args(argv)


def starts(floor: int, default: int, knee: int) -> tuple[int, ...]:
    return tuple(sorted({floor // 4, floor, default, knee, 4 * knee, 16 * knee}))


def start_rows(
    link_bound: Product, hbm_bound: Product, launches: int, clock: Clock
) -> list[dict[str, Any]]:
    """Series from every start, under control and fixed."""
    window, rows = link_bound.window, []
    floor, knee = profile_limits(window)
    for start in starts(floor, default_window(window.link), knee):
        for mode in ("auto", "wide", "fixed"):
            setting = Setting(mode, start)
            if not clock.allows(str(setting)):
                continue
            series = run_series(link_bound.captured(setting), launches)
            rows += [
                row("launch, link", setting, link_bound, each.seconds, launch=number)
                for number, each in enumerate(series)
            ]
            seconds = settled(series, SETTLED_AT)
            rows.append(row("link, settled", setting, link_bound, seconds, window=window.nbytes))
            if mode != "fixed":
                rows += history_rows(CHANGES[0], setting, link_bound)
            series = run_series(hbm_bound.captured(setting), launches)
            seconds = settled(series, launches // 2)
            rows.append(row("hbm, settled", setting, hbm_bound, seconds, window=window.nbytes))
    return rows


def history_rows(part: str, setting: Setting, product: Product) -> list[dict[str, Any]]:
    """The changes that kernels recorded."""
    return [
        {
            "part": part,
            "mode": setting.mode,
            "start_window": setting.start,
            "window": change.nbytes,
            "update": change.update,
            "cause": change.cause,
            "gpu_seconds": change.seconds,
            "delay_seconds": change.delay,
            "least_delay_seconds": change.least_delay,
            "in_flight": change.in_flight,
        }
        for change in product.window.history().changes
    ]


def beside_copy_rows(
    products: Sequence[Product], remote: str, device: torch.device, clock: Clock
) -> list[dict[str, Any]]:
    """A copy of 1 GB begun while products are repeated."""
    link_bound, hbm_bound, resident = products
    where: dict[str, Any] = {"pin_memory": True} if remote == "cpu" else {"device": remote}
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, **where)
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target.copy_(source)
    floor, knee = profile_limits(link_bound.window)
    default, rows = default_window(link_bound.window.link), []
    before = 60
    # twice as long as copy and products take when each has half of the link
    count = before + round(8 * COPY_BYTES / max(1, link_bound.remote_bytes))
    settings = [Setting("auto", default)]
    settings += [Setting("fixed", size) for size in sorted({floor, default, knee})]
    for setting in settings:
        if not clock.allows(f"beside a copy: {setting}", 2.0):
            continue
        for part, product in (("link", link_bound), ("hbm", hbm_bound)):
            series, copy = run_beside_copy(
                product.captured(setting), source, target, before=before, count=count
            )
            rows += copy_rows(setting, product, part, series, copy)
            if part == "link" and setting.mode == "auto":
                rows += history_rows(CHANGES[1], setting, product)
    alone = Setting("none", 0)
    series, copy = run_beside_copy(
        resident.captured(Setting("fixed", default)), source, target, before=before, count=count
    )
    return rows + copy_rows(alone, resident, "resident", series, copy)


def second_process_rows(
    products: Sequence[Product], remote: str, clock: Clock
) -> list[dict[str, Any]]:
    """Products before, while and after another process copies over the same link."""
    if not clock.allows("beside a second process", 2 * PROCESS_SECONDS):
        return []
    link_bound, hbm_bound = products[:2]
    setting = Setting("auto", default_window(link_bound.window.link))
    steps = [(part, product, product.captured(setting)) for part, product in
             (("link", link_bound), ("hbm", hbm_bound))]  # fmt: skip

    def measure(when: str) -> list[dict[str, Any]]:
        return [
            row(f"{part} {when} a second process", setting, product,
                settled(run_series(step, 200), 50, 150), window=product.window.nbytes)
            for part, product, step in steps
        ]  # fmt: skip

    rows = measure("before")
    command = [sys.executable, "-c", _SECOND_PROCESS, remote, str(PROCESS_SECONDS / 4)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            if other.stdout.readline().strip() == "ready":
                rows += measure("beside")
                copied = float(other.stdout.readline() or 0)
                for each in rows[-2:]:
                    each["copied_gigabytes_per_second"] = copied / 1e9
            other.wait(timeout=PROCESS_SECONDS)
        finally:
            other.kill()
    return rows + measure("after")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    device = command_line.default_device()
    if device.type != "cuda" or arguments.remote == "simulated":
        raise SystemExit(
            "windows bound what a GPU has in flight; this is no GPU with a remote tier"
        )
    clock = Clock(arguments.seconds)
    if arguments.quick:
        arguments.launches = min(arguments.launches, 20)
    TRIALS.switch(False)  # the kernel, also where another way is faster
    measured = ceilings.measure(device, arguments.remote, QUICK, host_memory=arguments.host_memory)
    tier = open_tier(arguments.remote, device=device, host_memory=arguments.host_memory)
    window = window_of(device, tier.name)
    before = window.nbytes
    link_bound, hbm_bound = make_products(
        tier, window, device, measured.hbm_stream, measured.link_direct
    )
    resident = all_local(hbm_bound, tier, device)
    products = (link_bound, hbm_bound, resident)
    rows: list[dict[str, Any]] = []
    try:
        rows += start_rows(link_bound, hbm_bound, arguments.launches, clock)
        if clock.allows("beside a copy", 4.0):
            rows += beside_copy_rows(products, arguments.remote, device, clock)
        rows += second_process_rows(products, arguments.remote, clock)
    finally:
        torch.cuda.synchronize()
        window.set(before)
    verdicts = [
        *start_verdicts(rows),
        *copy_verdicts(rows, measured.best_link),
        *best_fixed_verdicts(rows),
    ]
    record = make_record(
        "window" if arguments.remote == "cpu" else "window_peer",
        arguments=command_line.arguments_dict(arguments),
        cells=rows,
        verdicts=verdicts,
        ceilings=measured.as_dict(),
        window_history=window_history(rows),
        notes=[f"no time left for: {', '.join(clock.skipped)}"] if clock.skipped else [],
        commit=arguments.commit,
    )
    path = record.write(arguments.out)
    shown = [cell for cell in rows if cell["part"] not in ("launch, link", *CHANGES)]
    print(summary(replace(record, cells=tuple(shown)), COLUMNS), flush=True)
    print(f"record: {path}", flush=True)
    return 0 if record.passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
