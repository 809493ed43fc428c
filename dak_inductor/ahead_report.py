"""Which products of the steps seen are copied ahead, which are read in place, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from dak_inductor.binding import Binding
from dak_inductor.lowering.ahead.known_step import KnownStep
from dak_inductor.lowering.ahead.memory import tokens_text
from dak_inductor.lowering.ahead.sequence import StepCall
from dak_inductor.lowering.ahead.step_plan import StepPlan
from dak_inductor.quantity_text import bytes_text, count_text, seconds_text
from dak_inductor.tensor_names import role

CAPTURED, EAGER = "in CUDA graphs", "outside of CUDA graphs"
COLUMNS = ("weights", "remote bytes", "why", "count")


@dataclass(frozen=True, slots=True)
class OpStrategy:
    """One product: the tensors that it reads, "staged" or "direct", and the reason."""

    tensors: tuple[str, ...]
    strategy: str
    reason: str


@dataclass(frozen=True, slots=True)
class StepStrategy:
    """One step: a graph at one set of token counts.

    Attributes:
        seconds: predicted, `direct_seconds` with none staged; in CUDA graphs where `where` is "".
            Of its products, and there in decode of what lies between them.
        off: why the step is left alone, "" where it is not; it has no products then.
        where: `CAPTURED` or `EAGER`; "" where the same products are staged in both.
        eager_seconds: predicted outside of CUDA graphs.
        waits_for_host: whether the host takes longer than the GPU there.
    """

    graph: str
    tokens: str
    ops: tuple[OpStrategy, ...]
    ring_bytes: int
    seconds: float
    direct_seconds: float
    off: str = ""
    where: str = ""
    eager_seconds: float = 0.0
    waits_for_host: bool = False

    @property
    def staged(self) -> int:
        """How many products are."""
        return sum(op.strategy == "staged" for op in self.ops)

    def __str__(self) -> str:
        head = ", ".join(filter(None, (self.graph, self.tokens, self.where)))
        if self.off:
            return f"{head}: nothing is copied ahead: {self.off}"
        text = (
            f"{head}: {self.staged} of {count_text(len(self.ops), 'product')} copied ahead through "
            f"{bytes_text(self.ring_bytes)}; predicted {seconds_text(self.seconds)}, all direct "
            f"{seconds_text(self.direct_seconds)}"
        )
        if not self.waits_for_host:
            return text
        if self.where:
            return f"{text}; the GPU waits for the host"
        return f"{text}; {EAGER} {seconds_text(self.eager_seconds)}, which the host takes"


def strategies_of(bindings: Iterable[Binding]) -> tuple[StepStrategy, ...]:
    """Of all steps that were planned or given up, in the order in which they were first called: one
    or, where other products are staged in CUDA graphs than outside of them, two for each. One that
    Inductor captures is in CUDA graphs alone."""
    found = []
    for binding in bindings:
        if binding.ahead is None:
            continue
        names = {
            id(buffer): binding.names[index] for index, buffer in binding.live_buffers().items()
        }
        for tokens, known in binding.ahead.steps():
            found += _strategies(binding.graph, tokens_text(tokens), known, names)
    return tuple(found)


def _strategies(
    graph: str, tokens: str, known: KnownStep, names: dict[int, str]
) -> list[StepStrategy]:
    plans, sequence = known.plans, known.sequence
    if plans is None or sequence is None:
        return [StepStrategy(graph, tokens, (), 0, 0.0, 0.0, known.off)]
    tensors = [_tensors(call, names) for call in sequence.calls]

    def strategy(plan: StepPlan, where: str) -> StepStrategy:
        ops = tuple(
            OpStrategy(each, op.strategy, op.reason)
            for each, op in zip(tensors, plan.ops, strict=True)
        )
        return StepStrategy(
            graph, tokens, ops, plan.ring_bytes, plan.seconds, plan.direct_seconds, known.off,
            where, plans.eager.seconds, plans.eager.waits_for_host and where != CAPTURED,
        )  # fmt: skip

    if known.inside:  # Inductor's graph: calls are replays of it
        return [strategy(plans.captured, CAPTURED)]
    chosen = [[op.strategy for op in plan.ops] for plan in (plans.captured, plans.eager)]
    if chosen[0] == chosen[1]:
        return [strategy(plans.captured, "")]
    return [strategy(plans.captured, CAPTURED), strategy(plans.eager, EAGER)]


def _tensors(call: StepCall, names: dict[int, str]) -> tuple[str, ...]:
    held = [None if weight.buffer is None else weight.buffer() for weight in call.weights]
    found = [names.get(id(buffer), buffer.label) for buffer in held if buffer is not None]
    return tuple(dict.fromkeys(found))


def render(steps: Iterable[StepStrategy]) -> Group:
    """For a rich console; a row for equal layers."""
    parts: list[Text | Table] = []
    for step in steps:
        parts.append(Text(str(step)))
        rows = rows_of(step)
        if rows:
            parts.append(_table(rows))
    return Group(*parts)


def rows_of(step: StepStrategy) -> dict[tuple[str, str, str], int]:
    """How many products of equal layers have the same weights, strategy and reason."""
    rows: dict[tuple[str, str, str], int] = {}
    for op in step.ops:
        row = (", ".join(map(role, op.tensors)), op.strategy, op.reason)
        rows[row] = rows.get(row, 0) + 1
    return rows


def _table(rows: dict[tuple[str, str, str], int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    *texts, number = COLUMNS
    for name in texts:
        table.add_column(name, overflow="fold")
    table.add_column(number, justify="right")
    for row, count in rows.items():
        table.add_row(*(Text(cell) for cell in row), str(count))
    return table
