"""Host pages: what creating, mapping and filling them costs, each alone and all at once.

A load into the host tier creates pages (cuMemCreate), maps them (cuMemMap, cuMemSetAccess) and
fills them (copy engine). Its rate is at best that of the slowest, and less where the stages hold
each other up; the cells say which. Bar: all three together, from a file, at 5 GB/s.

    python benchmarks/bench_pages.py --out DIR [--total 6GB] [--tensor 112MiB]
        [--handles 2MiB,8MiB,32MiB,128MiB] [--creators 1,4,8] [--folder /dev/shm]
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from dak_inductor.benchmarks.bench_load import choose_folder, warm_host_memory
from dak_inductor.benchmarks.harness import command_line
from dak_inductor.benchmarks.harness.record import Verdict, make_record
from dak_inductor.cuda_runtime import vmm
from dak_inductor.cuda_runtime.file_bytes import FileBytes
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.tiers import open_tier
from dak_inductor.cuda_runtime.vmm import VmmTier

BAR_RATE = 5e9
DRAIN_SECONDS = 120.0
LARGEST_HANDLE = 32 << 20
COLUMNS = ("stages", "tensor_bytes", "creators", "bytes", "seconds", "gigabytes_per_second")

Fill = Callable[[TieredBuffer], object]


def sizes(text: str) -> tuple[int, ...]:
    """'2MiB,32MiB' in bytes."""
    return tuple(command_line.memory_bytes(part) for part in text.split(","))


def counts(text: str) -> tuple[int, ...]:
    return tuple(max(1, count) for count in command_line.numbers(text, int, "1,4,8"))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = command_line.parser("Creating, mapping and filling host pages")
    memory = command_line.memory_bytes
    made.add_argument("--total", type=memory, default=6 * 10**9, help="bytes per cell")
    made.add_argument("--tensor", type=memory, default=112 << 20, help="bytes of a tensor")
    made.add_argument(
        "--handles",
        type=sizes,
        default=sizes("2MiB,8MiB,32MiB,128MiB"),
        help="tensor sizes that are created alone; allocations are of 32 MiB at most",
    )
    made.add_argument("--creators", type=counts, default=(1, 4, 8), help="threads that create")
    made.add_argument("--folder", type=Path, default=None, help="where the file to read goes")
    made.add_argument("--repeats", type=int, default=2)
    return made.parse_args(argv)


def cell(stages: str, tensor: int, nbytes: int, seconds: float, **more: object) -> dict[str, Any]:
    return {
        "stages": stages,
        "tensor_bytes": tensor,
        "creators": 1,
        "bytes": nbytes,
        "seconds": seconds,
        "gigabytes_per_second": nbytes / seconds / 1e9 if seconds else 0.0,
        **more,
    }


def give_back() -> None:
    """Have all pages freed before the next cell begins."""
    gc.collect()
    if not vmm.drain(DRAIN_SECONDS):
        raise SystemExit(f"pages were not freed within {DRAIN_SECONDS:.0f} s")


def created(tier: VmmTier, tensor: int, count: int, creators: int) -> dict[str, Any]:
    """Pages of `count` tensors, made and not mapped."""
    with ThreadPoolExecutor(creators) as threads:
        begun = time.perf_counter()
        made = list(threads.map(lambda _: tier._tier.make(tensor, 0), range(count)))
        seconds = time.perf_counter() - begun
    del made
    give_back()
    return cell("create", tensor, tensor * count, seconds, creators=creators)


def mapped(tier: VmmTier, tensor: int, count: int) -> list[dict[str, Any]]:
    """Pages that are there: mapping them, and granting access."""
    made = [tier._tier.make(tensor, 0) for _ in range(count)]
    for pages in made:
        pages.map()
    times = [pages.make_times for pages in made]
    rows = [
        cell("map", tensor, tensor * count, sum(t.map_seconds for t in times)),
        cell("set access", tensor, tensor * count, sum(t.access_seconds for t in times)),
    ]
    del made, pages
    give_back()
    return rows


def filled(tier: VmmTier, name: str, tensor: int, count: int, fill: Fill) -> dict[str, Any]:
    """One mapped buffer, filled again and again."""
    buffer = tier.allocate(tensor, split=0)
    fill(buffer)
    begun = time.perf_counter()
    for _ in range(count):
        fill(buffer)
    seconds = time.perf_counter() - begun
    del buffer
    give_back()
    return cell(f"fill from {name}", tensor, tensor * count, seconds)


def created_beside_filling(
    tier: VmmTier, name: str, tensor: int, count: int, fill: Fill
) -> list[dict[str, Any]]:
    """What creation loses while another thread fills a buffer that is there, and the reverse."""
    buffer = tier.allocate(tensor, split=0)
    done = threading.Event()
    fills = 0

    def keep_filling(held: TieredBuffer) -> None:
        nonlocal fills
        while not done.is_set():
            fill(held)
            fills += 1

    filler = threading.Thread(target=keep_filling, args=(buffer,))
    filler.start()
    begun = time.perf_counter()
    made = [tier._tier.make(tensor, 0) for _ in range(count)]
    seconds = time.perf_counter() - begun
    done.set()
    filler.join()
    del made, buffer
    give_back()
    return [
        cell(f"create, beside filling from {name}", tensor, tensor * count, seconds),
        cell(f"fill from {name}, beside creating", tensor, tensor * fills, seconds),
    ]


def one_thread(tier: VmmTier, tensor: int, count: int, fill: Fill) -> dict[str, Any]:
    """Create, map and fill in turn, nothing made ahead."""
    begun = time.perf_counter()
    buffers = []
    for _ in range(count):
        buffers.append(tier.allocate(tensor, split=0))
        fill(buffers[-1])
    seconds = time.perf_counter() - begun
    buffers.clear()
    give_back()
    return cell("create, map, fill in turn", tensor, tensor * count, seconds)


def together(
    tier: VmmTier, name: str, tensor: int, count: int, fill: Fill | None
) -> dict[str, Any]:
    """The pipeline of a load: a thread that creates, one that maps, and this one."""
    begun = time.perf_counter()
    kept = []
    with closing(tier.allocate_each([(tensor, 0)] * count)) as buffers:
        for buffer in buffers:
            if fill is not None:
                fill(buffer)
            kept.append(buffer)
            del buffer
    seconds = time.perf_counter() - begun
    kept.clear()
    give_back()
    return cell(name, tensor, tensor * count, seconds)


def cells(tier: VmmTier, arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Every cell once, slow ones last."""
    tensor = arguments.tensor
    count = max(2, arguments.total // tensor)
    source = torch.randint(0, 256, (tensor,), dtype=torch.uint8)
    path = folder / "tensor.bin"
    path.write_bytes(source.numpy().tobytes())
    rows = []
    for size in arguments.handles:
        for creators in arguments.creators:
            rows.append(created(tier, size, max(2, arguments.total // size), creators))
    rows += mapped(tier, tensor, count)
    with path.open("rb") as file:
        stored = FileBytes(file.fileno(), 0, os.fstat(file.fileno()).st_size, str(path))
        fills: dict[str, Fill] = {
            "memory": lambda buffer: buffer.write(source),
            "a file": lambda buffer: buffer.write_file(stored),
        }
        for name, fill in fills.items():
            rows.append(filled(tier, name, tensor, count, fill))
            rows += created_beside_filling(tier, name, tensor, count, fill)
        rows.append(one_thread(tier, tensor, count, fills["a file"]))
        rows.append(together(tier, "create and map at once", tensor, count, None))
        for name, fill in fills.items():
            rows.append(together(tier, f"all at once, from {name}", tensor, count, fill))
    return rows


def verdict(rows: Sequence[dict[str, Any]], *, decides: bool) -> Verdict:
    rates = [r["gigabytes_per_second"] for r in rows if r["stages"] == "all at once, from a file"]
    best = max(rates) * 1e9
    note = "" if decides else "not at full size on a GPU"
    return Verdict(
        "create, map and fill from a file, at once", best, BAR_RATE, "B/s",
        best >= BAR_RATE if decides else None, note,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.quick:
        arguments.total, arguments.repeats = min(arguments.total, 1 << 30), 1
    if arguments.remote != "cpu":
        raise SystemExit(f"--remote {arguments.remote}: only the host tier of a GPU has host pages")
    device = command_line.default_device()
    tier = open_tier("cpu", device=device, host_memory=arguments.host_memory)
    if not isinstance(tier, VmmTier):
        raise SystemExit("this system refuses host pages; there is nothing to measure")
    rows = []
    with tempfile.TemporaryDirectory(dir=choose_folder(arguments.folder, arguments.tensor)) as made:
        for repeat in range(arguments.repeats):
            warm_host_memory(round(1.1 * arguments.total))
            rows += [{"repeat": repeat, **row} for row in cells(tier, arguments, Path(made))]
    record = make_record(
        "pages",
        arguments=command_line.arguments_dict(arguments),
        cells=rows,
        verdicts=[verdict(rows, decides=arguments.total >= 4e9)],
        notes=[f"allocations of at most {LARGEST_HANDLE >> 20} MiB, whatever the tensor's size"],
        commit=arguments.commit,
    )
    return command_line.finish(record, ("repeat", *COLUMNS), arguments.out)


if __name__ == "__main__":
    raise SystemExit(main())
