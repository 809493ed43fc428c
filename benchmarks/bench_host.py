"""What a product takes of the host outside of CUDA graphs, by the way that serves it.

A chain of linear layers so small that the GPU waits for the host. From it come the figures of
`lowering/host_cost.py`, by which plans outside of CUDA graphs are chosen.

    python benchmarks/bench_host.py --out DIR [--products 48]
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from unittest import mock

import torch

import dak_inductor as dak
from dak_inductor import copy_ring
from dak_inductor.benchmarks.harness import command_line
from dak_inductor.benchmarks.harness.comparison import release
from dak_inductor.benchmarks.harness.record import make_record
from dak_inductor.benchmarks.harness.timing import REPLAYS, TimingRule, capture, time_calls
from dak_inductor.lowering.linear import ring
from dak_inductor.lowering.linear.configuration import MAXIMUM_TOKENS
from dak_inductor.lowering.linear.problem import LinearProblem
from dak_inductor.lowering.linear.ring_plan import Part, RingPlan
from dak_inductor.options import Strategy

WIDTH = 1024
MANY = MAXIMUM_TOKENS + 8
"""Tokens that the kernel does not take."""
COLUMNS = ("way", "tokens", "share", "parts", "host_microseconds", "card_microseconds", "staged")


@dataclass(frozen=True, slots=True)
class Case:
    """How the products of a chain are served.

    Attributes:
        share: of the weights, remote.
        parts: that are copied of each weight beside the products; 0: as the plan has it.
    """

    way: str
    tokens: int
    share: float
    strategy: Strategy = "direct"
    parts: int = 0


CASES = (
    Case("kernel", 1, 0.5),
    Case("stock operator, nothing remote", MANY, 0.0),
    Case("ring of its own, in line", MANY, 1.0),
    Case("ring of its own, in line, half local", MANY, 0.5),
    Case("ring of its own, one part", MANY, 1.0, parts=1),
    Case("ring of its own, four parts", MANY, 1.0, parts=4),
    Case("copied ahead, stock operators", MANY, 1.0, "staged"),
    Case("copied ahead, four parts", MANY, 1.0, "staged", parts=4),
    Case("copied ahead, one launch", 1, 1.0, "staged"),
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = command_line.parser(__doc__.splitlines()[0] if __doc__ else "")
    made.add_argument("--products", type=int, default=48)
    made.add_argument("--width", type=int, default=WIDTH, help="of the square weights")
    return made.parse_args(argv)


@contextlib.contextmanager
def in_parts(parts: int, weight_bytes: int) -> Iterator[None]:
    """All rings copy so many parts of each weight; as planned for 0."""
    if not parts:
        yield
        return
    small = copy_ring.PARTS_IN_RING * weight_bytes // parts

    def plan(problem: LinearProblem, *_: object, **__: object) -> RingPlan:
        each = problem.n // parts
        made = [Part(0, first, first + each, staged=True) for first in range(0, problem.n, each)]
        return RingPlan(tuple(made), (each,) * parts, 0.0, copy_bound=True)

    with (
        mock.patch.object(ring, "plan_of", plan),
        mock.patch.multiple(copy_ring, RING_BYTES=small, LEAST_RING_BYTES=small),
    ):
        yield


class Chain(torch.nn.Module):
    """Linear layers one after the other, weights [width, width]."""

    def __init__(self, products: int, width: int, device: torch.device) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(width, width, dtype=torch.bfloat16, device=device)
            for _ in range(products)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [tokens, width]."""
        for layer in self.layers:
            x = layer(x)
        return x


def row_of(
    case: Case, arguments: argparse.Namespace, device: torch.device, rule: TimingRule
) -> dict[str, object]:
    """Microseconds of one product: of calls from the host, and of replays."""
    torch._dynamo.reset()
    model = Chain(arguments.products, arguments.width, device).requires_grad_(False)
    dak.offload(
        model,
        offload_ratio=case.share,
        remote=arguments.remote,
        host_memory=arguments.host_memory,
    )
    model.compile(backend="dak", dynamic=False, options={"strategy": case.strategy})
    x = torch.randn(case.tokens, arguments.width, dtype=torch.bfloat16, device=device)
    with in_parts(case.parts, 2 * arguments.width**2):
        for _ in range(4):
            model(x)
        check_served(model, x)
        calls = time_calls([lambda: model(x)], device=device, rule=rule, method="calls")
        steps = dak.explain(model).strategies
        row: dict[str, object] = {
            "way": case.way,
            "tokens": case.tokens,
            "share": case.share,
            "parts": case.parts,
            "host_microseconds": calls.seconds / arguments.products * 1e6,
            "card_microseconds": None,
            "staged": max((each.staged for each in steps), default=0),
        }
        if device.type == "cuda":
            graph = capture(lambda: model(x))
            replays = time_calls([graph], device=device, rule=rule, method=REPLAYS)
            row["card_microseconds"] = replays.seconds / arguments.products * 1e6
    dak.restore(model)
    return row


def check_served(model: Chain, x: torch.Tensor) -> None:
    """Raises RuntimeError where the products of a call are not all ours."""
    dak.stats(reset=True)
    model(x)
    counted = sum(read.calls for read in dak.stats(reset=True).reads)
    if counted != len(model.layers):
        raise RuntimeError(f"{counted} of {len(model.layers)} products were served by this package")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    device = command_line.default_device()
    rule = replace(command_line.timing_rule(arguments), target_seconds=0.5)
    rows = []
    with torch.no_grad():
        for case in CASES:
            rows.append(row_of(case, arguments, device, rule))
            release(device)
    notes = ["where the card takes longer than the host, the figure is the card's"]
    if device.type != "cuda":
        notes.append("no GPU: products by the reference operators")
    record = make_record(
        "host",
        arguments=command_line.arguments_dict(arguments),
        cells=rows,
        notes=notes,
        commit=arguments.commit,
    )
    return command_line.finish(record, COLUMNS, arguments.out)


if __name__ == "__main__":
    raise SystemExit(main())
