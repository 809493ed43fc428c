"""What planning again takes where it moves nothing: the pause of a step at calls 16, 256, ...

Decoder blocks on the `simulated` tier, compiled without code generation, called as decode and as
prefill. Bar: below 1 ms, where nothing has changed since the last plan, and where
the graphs' shares of the calls have, so that a plan is made and finds all in place.

    python benchmarks/bench_replan.py --out DIR [--layers 32]
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

import dak_inductor as dak
from dak_inductor import replanning
from dak_inductor.backend import compile_graph
from dak_inductor.benchmarks.harness import command_line
from dak_inductor.benchmarks.harness.models import TINY, Workload
from dak_inductor.benchmarks.harness.record import Verdict, make_record
from dak_inductor.binding import Binding
from dak_inductor.offloaded import record_of
from dak_inductor.offloaded_model import OffloadedModel
from dak_inductor.options import BackendOptions
from dak_inductor.session import SESSION

BAR_MILLISECONDS = 1.0
CONTEXT = 300
MANY_CALLS = 1 << 20
"""As often each graph is taken to have been called: moves pay, so that all comes into place."""
COLUMNS = ("changed", "graphs", "tensors", "repeats", "median_milliseconds", "worst_milliseconds")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = command_line.parser(__doc__.splitlines()[0] if __doc__ else "")
    made.add_argument("--layers", type=int, default=32)
    made.add_argument("--repeats", type=int, default=50)
    return made.parse_args(argv)


def settled(model: OffloadedModel, bindings: Sequence[Binding]) -> bool:
    """Plan until nothing is left to move; whether that came."""
    return any(
        replanning.replan(model, bindings) is None and model.settled is not None for _ in range(5)
    )


def measure(
    model: OffloadedModel,
    bindings: Sequence[Binding],
    repeats: int,
    before: Callable[[], object],
) -> list[float]:
    """Milliseconds of each re-planning. Raises RuntimeError where one moved bytes."""
    found = []
    for _ in range(repeats):
        before()
        begun = time.perf_counter()
        moved = replanning.replan(model, bindings)
        found.append((time.perf_counter() - begun) * 1e3)
        if moved is not None:
            raise RuntimeError("a plan moved bytes: this is not what was to be measured")
    return found


def row(changed: str, model: OffloadedModel, graphs: int, times: Sequence[float]) -> dict[str, Any]:
    return {
        "changed": changed,
        "graphs": graphs,
        "tensors": len(model.tensors()),
        "repeats": len(times),
        "median_milliseconds": statistics.median(times),
        "worst_milliseconds": max(times),
    }


def rows_of(layers: int, repeats: int) -> list[dict[str, Any]]:
    """With the graph of decode alone, then with that of prefill beside it."""
    SESSION.reset()
    torch._dynamo.reset()
    device = torch.device("cpu")
    decode_step = Workload(TINY, context=CONTEXT).with_layers(layers)
    network = decode_step.build(device)
    dak.offload(network, offload_ratio=0.3, remote="simulated")
    model = record_of(network)
    assert model is not None
    backend = functools.partial(
        compile_graph, settings=BackendOptions(), executor=lambda graph, _: graph.forward
    )
    step = torch.compile(network, backend=backend, dynamic=False)
    rows = []
    for workload in (decode_step, replace(decode_step, prefill=True)):
        with torch.no_grad():
            step(*workload.inputs(device).arguments())
        bindings = SESSION.bindings()
        for binding in bindings:
            binding.calls = MANY_CALLS
        if not settled(model, bindings):
            raise RuntimeError("plan after plan moves bytes")
        times = measure(model, bindings, repeats, lambda: None)
        rows.append(row("nothing", model, len(bindings), times))
    decode = bindings[0]

    def call_decode() -> None:
        decode.calls += 1

    times = measure(model, bindings, repeats, call_decode)
    rows.append(row("shares of the calls", model, len(bindings), times))
    dak.restore(network)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    rows = rows_of(arguments.layers, arguments.repeats)
    verdicts = [
        Verdict(
            f"re-planning that moves nothing, {each['graphs']} graphs, changed: {each['changed']}",
            each["median_milliseconds"],
            BAR_MILLISECONDS,
            "ms",
            each["median_milliseconds"] < BAR_MILLISECONDS,
            f"worst {each['worst_milliseconds']:.2f} ms",
        )
        for each in rows
    ]
    record = make_record(
        "replan",
        arguments=command_line.arguments_dict(arguments),
        cells=rows,
        verdicts=verdicts,
        notes=["simulated tier: on a GPU a look at its memory comes on top"],
        commit=arguments.commit,
    )
    return command_line.finish(record, COLUMNS, arguments.out)


if __name__ == "__main__":
    raise SystemExit(main())
