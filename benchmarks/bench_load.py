"""Loading a checkpoint from the page cache into the host tier: rate, and host memory taken for it.

Bars: at least 5 GB/s into memory that the machine has already given; for N bytes offloaded at most
N + 2 MiB per tensor + 1%. A safetensors file of about 8 GB is made first and read once. Beside it
the driver's own part is measured: making as many pages, neither mapped nor filled.

    python benchmarks/bench_load.py --out DIR [--layers 18] [--folder /dev/shm]
"""

from __future__ import annotations

import argparse
import gc
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import dak_inductor as dak
from dak_inductor.benchmarks.harness import command_line
from dak_inductor.benchmarks.harness.memory import PeakMemory, host_bytes_used
from dak_inductor.benchmarks.harness.models import SHAPES, DecoderBlocks, Workload
from dak_inductor.benchmarks.harness.record import Verdict, make_record
from dak_inductor.cuda_runtime import vmm
from dak_inductor.cuda_runtime.tiers import open_tier
from dak_inductor.cuda_runtime.vmm import VmmTier
from dak_inductor.offloaded import record_of
from dak_inductor.offloaded_model import OffloadedWeight

BAR_RATE = 5e9
PAGE = 2 << 20
PAGES_AT_ONCE = 112 << 20
CHECKED_TENSORS = 12
COLUMNS = ("repeat", "seconds", "gigabytes_per_second", "remote_bytes", "pages_held",
           "system_used", "system_peak", "contents_same")  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = command_line.parser("Load rate and host memory of the host tier")
    made.add_argument("--layers", type=int, default=18, help="18 Llama-3-8B layers are 7.9 GB")
    made.add_argument(
        "--shape", choices=("llama3-8b", "tiny"), default=command_line.default_shape()
    )
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--folder", type=Path, default=None, help="where the file goes")
    return made.parse_args(argv)


def make_checkpoint(workload: Workload, folder: Path, device: torch.device) -> Path:
    """Random weights, drawn on `device`, in one safetensors file under the model's own names."""
    path = folder / "weights.safetensors"
    state = {name: tensor.cpu() for name, tensor in workload.build(device).state_dict().items()}
    save_file(state, path)
    return path


def choose_folder(wanted: Path | None, nbytes: int) -> Path:
    """The first folder with room for the file: in memory if possible."""
    candidates = [wanted] if wanted else [Path("/dev/shm"), Path(tempfile.gettempdir())]
    for folder in candidates:
        if folder.is_dir() and shutil.disk_usage(folder).free > 1.1 * nbytes:
            return folder
    raise SystemExit(f"none of {[str(c) for c in candidates]} has room for {nbytes / 1e9:.1f} GB")


def read_once(path: Path) -> None:
    """Bring a file into the page cache."""
    with path.open("rb", buffering=0) as file:
        chunk = bytearray(64 << 20)
        while file.readinto(chunk):
            pass


def warm_host_memory(nbytes: int) -> None:
    """Make the machine give `nbytes` of memory, then free them: a hypervisor gives on first
    touch."""
    pieces = [
        torch.empty(min(1 << 30, nbytes - start), dtype=torch.uint8).fill_(1)
        for start in range(0, nbytes, 1 << 30)
    ]
    del pieces


def page_rate(tier: VmmTier, nbytes: int) -> float:
    """Bytes/s at which the driver makes host pages, in the handles that a load uses."""
    count = max(1, nbytes // PAGES_AT_ONCE)
    begun = time.perf_counter()
    made = [tier._tier.make(PAGES_AT_ONCE, 0) for _ in range(count)]
    seconds = time.perf_counter() - begun
    del made
    gc.collect()
    vmm.drain(60)
    return count * PAGES_AT_ONCE / seconds


@dataclass(frozen=True, slots=True)
class Held:
    """Remote bytes of a model and the pages that hold them."""

    tensors: int
    remote: int
    pages: int

    @property
    def allowed(self) -> float:
        return self.remote + PAGE * self.tensors + 0.01 * self.remote


def held(weights: Sequence[OffloadedWeight]) -> Held:
    remote = [w.buffer for w in weights if w.buffer.bytes_by_tier().remote]
    return Held(
        len(remote),
        sum(buffer.bytes_by_tier().remote for buffer in remote),
        sum(buffer.physical_bytes().remote for buffer in remote),
    )


def same_contents(model: torch.nn.Module, path: Path) -> bool:
    """Compare some tensors, first and last included, with the file."""
    state = model.state_dict()
    names = sorted(state)
    chosen = {*names[:: max(1, len(names) // CHECKED_TENSORS)], names[-1]}
    with safe_open(path, framework="pt") as file:
        return all(torch.equal(state[name].cpu(), file.get_tensor(name)) for name in chosen)


def load_once(workload: Workload, path: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """One timed load of the whole file into the remote tier."""
    model: DecoderBlocks = workload.build(torch.device("meta"))
    with PeakMemory(host_bytes_used, interval=0.02) as memory:
        begun = time.perf_counter()
        dak.offload(
            model,
            checkpoint=path,
            offload_ratio=1.0,
            remote=arguments.remote,
            host_memory=arguments.host_memory,
            progress=False,
        )
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
        used = host_bytes_used() - memory.start
    record = record_of(model)
    if record is None:
        raise SystemExit("dak.offload left no record of the model")
    found = held(list(record.weights.values()))
    return {
        "seconds": seconds,
        "gigabytes_per_second": found.remote / seconds / 1e9,
        "tensors": found.tensors,
        "remote_bytes": found.remote,
        "pages_held": found.pages,
        "allowed": found.allowed,
        "system_used": used,
        "system_peak": memory.peak - memory.start,
        "contents_same": same_contents(model, path),
    }


def verdicts(
    rows: Sequence[dict[str, object]], making: float | None, *, decides: bool
) -> list[Verdict]:
    """Rate, memory by pages and by the system's count, contents. `making`: rate of pages alone."""

    def median(name: str) -> float:
        return statistics.median(float(str(row[name])) for row in rows)

    rate, allowed = median("gigabytes_per_second") * 1e9, median("allowed")
    same = all(row["contents_same"] for row in rows)
    all_remote = all(float(str(row["remote_bytes"])) > 0 for row in rows)
    note = "" if decides else "not at full size on a GPU"
    driver = [] if making is None else [
        Verdict("load rate against making the pages alone", rate / making, 0.9, "x",
                rate >= 0.9 * making if decides else None, f"{making / 1e9:.2f} GB/s"),
    ]  # fmt: skip
    return [
        *driver,
        Verdict("load rate", rate, BAR_RATE, "B/s", rate >= BAR_RATE if decides else None, note),
        Verdict("host memory, pages held", median("pages_held"), allowed, "B",
                median("pages_held") <= allowed),
        Verdict("host memory, system's count", median("system_used"), allowed, "B",
                median("system_used") <= allowed if decides else None, note),
        Verdict("contents as in the file", float(same), 1.0, "share", same and all_remote),
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.quick:
        arguments.layers, arguments.repeats = min(arguments.layers, 2), 2
    device = command_line.default_device()
    workload = Workload(shape=SHAPES[arguments.shape])
    workload = workload.with_layers(arguments.layers)
    parent = choose_folder(arguments.folder, workload.linear_bytes)
    rows = []
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        path = make_checkpoint(workload, Path(folder), device)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        read_once(path)
        for repeat in range(arguments.repeats):
            warm_host_memory(round(1.1 * workload.linear_bytes))
            rows.append({"repeat": repeat, **load_once(workload, path, arguments)})
            gc.collect()
    tier = open_tier(arguments.remote, device=device)
    making = page_rate(tier, workload.linear_bytes) if isinstance(tier, VmmTier) else None
    decides = device.type == "cuda" and workload.linear_bytes >= 4e9
    record = make_record(
        "load",
        arguments=command_line.arguments_dict(arguments),
        cells=rows,
        verdicts=verdicts(rows, making, decides=decides),
        notes=[f"file of {workload.linear_bytes / 1e9:.2f} GB under {parent}"],
        commit=arguments.commit,
    )
    return command_line.finish(record, COLUMNS, arguments.out)


if __name__ == "__main__":
    raise SystemExit(main())
