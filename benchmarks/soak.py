"""Decode steps for hours: the resident's tokens, and memory of card and host that does not grow.

Two parts. `steps`: one model with a KV cache decodes, and every 1,000 steps the splits of weights
and cache are moved by hand or planned again. `minutes`: eight threads decode on two models, each
with a new cache for every sequence, while another thread moves their splits; what is held is
counted when all of them are between two sequences.

    python benchmarks/soak.py --out DIR [--steps 100000] [--minutes 5] [--resume]

`--resume` goes on from the record in DIR: the steps and cells of earlier parts stay in it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dak_inductor as dak
from dak_inductor.backend import compile_graph
from dak_inductor.benchmarks.harness import command_line
from dak_inductor.benchmarks.harness.growth import TOLERANCES, sample, verdicts
from dak_inductor.benchmarks.harness.record import Verdict, make_record
from dak_inductor.benchmarks.harness.soak_model import ON_CPU, ON_GPU, SoakModel
from dak_inductor.options import BackendOptions

COLUMNS = ("part", "phase", "steps", "moved_bytes", "misses", "host_bytes", "device_bytes",
           "objects")  # fmt: skip
SCRIPTS = 3
MISSED = "fail_on_recompile"
"""The stance of torch.compile in which code that is not found is an error that names the stance."""
LOOK_UPS = 100
"""Of one step, before what is missed counts as not there."""
THREADS, MODELS = 8, 2
CACHE_RATIO = 0.6


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = command_line.parser("Soak: tokens stay the resident's, memory does not grow")
    made.add_argument("--steps", type=int, default=None, help="100,000 on a GPU, else 2,000")
    made.add_argument("--every", type=int, default=None, help="from move to move: 1,000, else 40")
    made.add_argument("--minutes", type=float, default=0.0, help="of eight threads on two models")
    made.add_argument(
        "--ratio", type=float, default=0.4, help="share of the weights that is remote"
    )
    made.add_argument("--resume", action="store_true", help="go on from the record in --out")
    made.add_argument(
        "--uncompiled", action="store_true", help="run the backend's graphs without Inductor"
    )
    found = made.parse_args(argv)
    on_gpu = torch.cuda.is_available() and found.remote != "simulated"
    found.steps = (100_000 if on_gpu else 2_000) if found.steps is None else found.steps
    found.every = (1_000 if on_gpu else 40) if found.every is None else found.every
    return found


def compiler(uncompiled: bool, *, graphs: bool) -> Callable[[Any], None]:
    """How a model is compiled: by Inductor, with CUDA graphs or not, or not by Inductor."""

    def compile_it(model: Any) -> None:
        if uncompiled:
            backend = partial(
                compile_graph, settings=BackendOptions(), executor=lambda graph, _: graph.forward
            )
            model.compile(backend=backend)
        elif graphs:
            model.compile(backend="dak", options={"mode": "reduce-overhead"})
        else:
            model.compile(backend="dak")

    return compile_it


def decode(model: SoakModel, arguments: argparse.Namespace, part: int) -> list[dict[str, object]]:
    """`steps` steps on one cache, sequence after sequence; a cell for every 1,000 of them."""
    cache = model.cache(CACHE_RATIO)
    chance = random.Random(part)
    cells: list[dict[str, object]] = []
    misses = taken_in_all = 0
    begun = time.perf_counter()
    numbers = itertools.count()
    while taken_in_all < arguments.steps:
        number = next(numbers)
        script = model.scripts[number % len(model.scripts)]
        cache.reset()
        start, end = model.size.prompt, script.tokens.shape[1]
        taken = torch.empty_like(script.tokens[:, start:])
        for at in range(start, end):
            first = at if at > start else 1
            taken[:, at - start] = model.step(cache, script.tokens[:, first - 1 : at])
            taken_in_all += 1
            if taken_in_all % arguments.every == 0:
                planned = len(cells) % 2 == 1
                moved = model.replan() if planned else model.move(chance.random(), cache)
                cells.append(
                    {
                        "part": part,
                        "phase": "steps",
                        "steps": taken_in_all,
                        "moved_bytes": moved,
                        "planned": planned,
                        "misses": misses,
                        "seconds": time.perf_counter() - begun,
                        "remote_bytes_read": dak.stats().total.remote,
                        **sample(),
                    }
                )
        misses += script.misses(taken)
    if cells:
        cells[-1]["misses"] = misses
    return cells


def found_again(step: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """A step of code that is compiled, and how often torch missed the code before.

    A missed step has not begun: nothing ran twice. Raises RuntimeError where the code is missed
    `LOOK_UPS` times.
    """
    for missed in range(LOOK_UPS):
        try:
            return step(), missed
        except RuntimeError as error:
            if MISSED not in str(error):
                raise
    raise RuntimeError(f"compiled code was not found in {LOOK_UPS} look-ups: it is not there")


class Pauses:
    """Moments at which all of a number of threads have let go of what they hold for a sequence."""

    def __init__(self, threads: int) -> None:
        self._wanted = threading.Event()
        self._gate = threading.Barrier(threads + 1)

    @property
    def wanted(self) -> bool:
        """Whether the others are waited for."""
        return self._wanted.is_set()

    def take_part(self) -> None:
        """Of one of the threads, between sequences: wait through a pause that is wanted."""
        if self.wanted:
            self._gate.wait()  # all have come
            self._gate.wait()  # and may go

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Of the thread that is none of them: nothing runs inside."""
        self._wanted.set()
        self._gate.wait()
        try:
            yield
        finally:
            self._wanted.clear()
            self._gate.wait()

    def end(self) -> None:
        """No more pauses: whoever waits, or comes to wait, gets BrokenBarrierError."""
        self._gate.abort()


def serve(
    models: Sequence[SoakModel], seconds: float, every: float, part: int
) -> list[dict[str, object]]:
    """Threads that decode one sequence after the other, each with a cache of its own, while another
    moves the weights. What is held is counted between sequences: one that is under way then is cut
    short, and its tokens so far are compared."""
    stop, lock = threading.Event(), threading.Lock()
    counts = {"steps": 0, "misses": 0, "sequences": 0, "moved_bytes": 0, "look_ups_missed": 0}
    errors: list[BaseException] = []
    pauses = Pauses(THREADS + 1)

    def guarded(work: Callable[[], None]) -> None:
        try:
            while not stop.is_set():
                work()
                pauses.take_part()
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            errors.append(error)
            stop.set()
            pauses.end()

    @torch.no_grad()
    def one_sequence(number: int, counter: itertools.count[int]) -> None:
        model = models[number % len(models)]
        script = model.scripts[next(counter) % len(model.scripts)]
        cache = model.cache(CACHE_RATIO)
        start, end = model.size.prompt, script.tokens.shape[1]
        taken: list[Tensor] = []
        missed = 0
        while len(taken) < end - start and not (taken and (stop.is_set() or pauses.wanted)):
            at = start + len(taken)
            given = script.tokens[:, at - 1 if taken else 0 : at]
            token, again = found_again(partial(model.step, cache, given))
            taken.append(token)
            missed += again
        misses = script.misses(torch.stack(taken, dim=1))
        with lock:
            counts["steps"] += len(taken)
            counts["misses"] += misses
            counts["look_ups_missed"] += missed
            counts["sequences"] += 1

    def move_one(chance: random.Random) -> None:
        model = chance.choice(list(models))
        with lock:
            counts["moved_bytes"] += model.move(chance.random())
        stop.wait(every / 4)

    for number in range(len(models)):  # compiled one after the other, before the threads
        one_sequence(number, itertools.count())
    work = [partial(one_sequence, n, itertools.count(n)) for n in range(THREADS)]
    work.append(partial(move_one, random.Random(part)))
    threads = [threading.Thread(target=guarded, args=(each,)) for each in work]
    cells: list[dict[str, object]] = []
    end = time.monotonic() + seconds
    with torch.compiler.set_stance(MISSED):
        for thread in threads:
            thread.start()
        # an interrupt ends the threads early, and what was counted until then is kept
        with contextlib.suppress(threading.BrokenBarrierError, KeyboardInterrupt):
            while time.monotonic() < end and not stop.wait(every):
                with pauses.paused():
                    cells.append({"part": part, "phase": "threads", **counts, **sample()})
        stop.set()
        pauses.end()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return cells


def token_verdict(cells: Sequence[dict[str, object]], what: str) -> Verdict:
    """No step took another token than the resident, near-ties left out."""
    misses = max((int(str(cell["misses"])) for cell in cells), default=0)
    return Verdict(f"{what}: tokens other than the resident's", misses, 0, "tokens", misses == 0)


def counts_of(cells: Sequence[Mapping[str, object]]) -> list[dict[str, float]]:
    """What may not grow, of each cell."""
    return [{name: float(str(cell[name])) for name in TOLERANCES if name in cell} for cell in cells]


def steps_of(cells: Sequence[Mapping[str, object]]) -> int:
    """Steps of all parts: each cell counts from the start of its phase and part."""
    last = {(cell["part"], cell["phase"]): int(str(cell["steps"])) for cell in cells}
    return sum(last.values())


def earlier(out: Path) -> list[dict[str, object]]:
    """The cells of the parts before this one."""
    path = out / "soak.json"
    return list(json.loads(path.read_text(encoding="utf-8"))["cells"]) if path.is_file() else []


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    cells = earlier(arguments.out) if arguments.resume else []
    part = 1 + max((int(str(cell["part"])) for cell in cells), default=-1)
    on_cpu = arguments.remote == "simulated"
    device = torch.device("cpu") if on_cpu else command_line.default_device()
    size = ON_CPU if on_cpu else ON_GPU
    make = partial(
        SoakModel, size, ratio=arguments.ratio, remote=arguments.remote, device=device,
        scripts=SCRIPTS,
    )  # fmt: skip
    found: list[Verdict] = []
    if arguments.steps:
        graphs = compiler(arguments.uncompiled, graphs=device.type == "cuda")
        with torch.no_grad():
            own = decode(make(seed=part, compiler=graphs), arguments, part)
        found += [token_verdict(own, "steps"), *verdicts(counts_of(own), "steps")]
        cells += own
    if arguments.minutes:
        plain = compiler(arguments.uncompiled, graphs=False)
        models = [make(seed=100 + number, compiler=plain) for number in range(MODELS)]
        seconds = 60 * arguments.minutes
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            own = serve(models, seconds, max(seconds / 40, 0.25), part)  # a line for each cache
        found += [token_verdict(own, "threads"), *verdicts(counts_of(own), "threads")]
        cells += own
    record = make_record(
        "soak",
        arguments=command_line.arguments_dict(arguments),
        cells=cells,
        verdicts=found,
        notes=[
            f"{steps_of(cells)} steps in {part + 1} parts; the verdicts are those of part {part}"
        ],
        commit=arguments.commit,
    )
    return command_line.finish(record, COLUMNS, arguments.out)


if __name__ == "__main__":
    raise SystemExit(main())
