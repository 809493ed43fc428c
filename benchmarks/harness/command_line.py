"""The options every benchmark script shares."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from dak_inductor.benchmarks.harness.record import Record
from dak_inductor.benchmarks.harness.table import summary
from dak_inductor.benchmarks.harness.timing import QUICK, TimingRule
from dak_inductor.offload_request import default_remote

Number = TypeVar("Number", int, float)


def parser(description: str) -> argparse.ArgumentParser:
    """--out, --quick, --remote, --host-memory, --commit."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    made.add_argument("--out", type=Path, default=Path("benchmark-results"), help="folder for JSON")
    made.add_argument("--quick", action="store_true", help="small sizes and short repeats")
    made.add_argument("--remote", default=default_remote(), help="cpu, cuda:N or simulated")
    made.add_argument(
        "--host-memory",
        type=memory_bytes,
        default=None,
        help="host bytes to take as available, on machines that grow their RAM on demand",
    )
    made.add_argument("--commit", default=None, help="parent commit, where no git checkout is")
    return made


def default_device() -> torch.device:
    """The current CUDA device, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def default_shape() -> str:
    """Real shapes where there is a GPU to run them."""
    return "llama3-8b" if torch.cuda.is_available() else "tiny"


def timing_rule(arguments: argparse.Namespace) -> TimingRule:
    return QUICK if arguments.quick else TimingRule()


def numbers(text: str, kind: Callable[[str], Number], example: str) -> tuple[Number, ...]:
    """A list with commas between, such as `example`."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list such as {example}") from error


def fractions(text: str) -> tuple[float, ...]:
    """'0.1,0.5' as remote fractions, each in [0, 1]."""
    values = numbers(text, float, "0.1,0.5")
    if any(not 0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: a remote fraction lies between 0 and 1")
    return values


_UNITS = {
    "": 1, "B": 1, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
}  # fmt: skip


def memory_bytes(text: str) -> int:
    """'24GB', '512MiB' or a number of bytes."""
    digits = text.rstrip("BKMGibkmg ")
    unit = text[len(digits) :].strip().upper()
    try:
        return int(float(digits) * _UNITS[unit])
    except (ValueError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory such as 24GB") from error


def arguments_dict(arguments: argparse.Namespace) -> dict[str, object]:
    return {name: value for name, value in vars(arguments).items() if name != "out"}


def finish(record: Record, columns: Sequence[str], out: Path) -> int:
    """Write the record, print its summary; exit status 1 when a bar was missed."""
    path = record.write(out)
    print(summary(record, columns), flush=True)
    print(f"record: {path}", flush=True)
    return 0 if record.passed else 1
