"""`dak bench`: texts of the command line to a request, a progress bar, and the table at the end."""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dak_inductor.errors import OptionError, TierError


@dataclass(frozen=True, slots=True)
class BenchText:
    """Lists and amounts as typed; "" for the default."""

    models: str = ""
    providers: str = ""
    batches: str = ""
    shares: str = ""
    host_memory: str = ""


def bench_models(text: BenchText, **options: Any) -> int:
    """Run the suite and print its table. Returns 1 where a bar was missed, else 0.

    Raises OptionError for a list that cannot be read or names what is not there, TierError for a
    real tier on a machine without a GPU.
    """
    try:
        import transformers  # noqa: F401 - every model comes from it
    except ImportError as error:
        advice = "dak bench needs transformers: pip install 'dak-inductor[demo]'"
        raise OptionError(advice) from error
    import torch

    from dak_inductor.benchmarks import bench_models as suite
    from dak_inductor.benchmarks.harness.model_verdicts import COLUMNS, table_rows
    from dak_inductor.benchmarks.harness.table import table, verdict_table

    request = suite.BenchRequest(
        models=_words(text.models),
        providers=_words(text.providers),
        batches=tuple(_numbers("batches", text.batches, int)),
        shares=tuple(_numbers("shares", text.shares, float)),
        host_memory=_memory(text.host_memory),
        **options,
    )
    on_gpu = torch.cuda.is_available()
    if request.remote == "simulated" and on_gpu:
        raise TierError("dak bench on a GPU measures real tiers: --remote cpu or cuda:N")
    with _bar() as progress:
        record = suite.run(request, on_gpu=on_gpu, progress=progress)
    print(f"== dak bench: {record.environment.get('gpu') or 'no GPU: nothing here is measured'} ==")
    print(table(table_rows(record.cells), COLUMNS))
    print()
    print(verdict_table(record.verdicts))
    for note in record.notes:
        print(f"note: {note}")
    path = Path(request.out) / f"{suite.NAME}.json"
    print(f"record: {path}; to look at it: dak report {path}", flush=True)
    return 0 if record.passed else 1


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(name: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(word) for word in _words(text)]
    except ValueError as error:
        raise OptionError(f"--{name} {text!r} is no list of numbers such as 1,16") from error


def _memory(text: str) -> int | None:
    from dak_inductor.benchmarks.harness.command_line import memory_bytes

    try:
        return memory_bytes(text) if text else None
    except ArgumentTypeError as error:
        raise OptionError(f"--host-memory: {error}") from error


@contextmanager
def _bar() -> Iterator[Callable[[int, int, str], None]]:
    """A bar over the rows on a terminal; elsewhere a line on stderr for each row that ends."""
    console = Console(stderr=True)
    if not console.is_terminal:
        seen = [0]

        def line(done: int, total: int, text: str) -> None:
            if done > seen[0]:
                print(f"{done}/{total} {text}", file=sys.stderr, flush=True)
            seen[0] = done

        yield line
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.description}"))  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None)

        def advance(done: int, total: int, text: str) -> None:
            progress.update(task, completed=done, total=total, description=text)

        yield advance
