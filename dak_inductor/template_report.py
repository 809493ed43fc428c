"""What serves each operator: the kernel or the stock path, what is fused into it, and the reason
why each template before it in the order cuda, triton does not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from dak_inductor.lowering.registry import TemplateRefusal
from dak_inductor.op_table import Op, OpTable
from dak_inductor.tensor_names import role


@dataclass(frozen=True, slots=True)
class OpTemplate:
    """One operator of one graph.

    epilogue:    what was fused into it: "silu + residual"; "" for nothing.
    template:    "cuda", "triton", "stock", or "simulated" where the tier is simulated on the CPU.
    passed_over: the templates that do not serve it, each with the reason.
    """

    graph: str
    op: str
    module: str
    kind: str
    epilogue: str
    template: str
    passed_over: tuple[TemplateRefusal, ...]

    @property
    def reasons(self) -> str:
        """One line for each template passed over."""
        return "\n".join(
            f"not {refusal.template}: {refusal.reason}" for refusal in self.passed_over
        )


def templates_of(graph: str, table: OpTable) -> list[OpTemplate]:
    """The operators of a graph that became dak:: ops, each once, in graph order."""
    ops: dict[str, Op] = {}
    for op in table.ops:
        if op.rewrite:
            ops.setdefault(op.node, op)
    return [
        OpTemplate(
            graph=graph,
            op=op.node,
            module=op.module,
            kind=op.kind,
            epilogue=op.epilogue,
            template=op.template or "simulated",
            passed_over=op.passed_over,
        )
        for op in ops.values()
    ]


def render(templates: Iterable[OpTemplate]) -> Table:
    """A table for a rich console; a row for equal layers."""
    rows: dict[tuple[str, str, str, str, str], int] = {}
    for op in templates:
        label = role(op.module or op.op)
        row = (label, op.kind, op.epilogue, op.template, op.reasons)
        rows[row] = rows.get(row, 0) + 1
    table = Table(title="kernels", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("operator", "kind", "fused", "served by", "reasons"):
        table.add_column(name, overflow="fold")
    table.add_column("count", justify="right")
    for row, count in rows.items():
        table.add_row(*(Text(cell) for cell in row), str(count))
    return table
