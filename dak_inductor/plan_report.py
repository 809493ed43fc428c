"""A plan as tables: what goes where, what bounds it, what it costs, what was refused and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from dak_inductor.op_notes import OpNotes
from dak_inductor.plan import OpPlan, Plan
from dak_inductor.quantity_text import bytes_text, count_text, seconds_text
from dak_inductor.refusal import Refusal
from dak_inductor.tensor_names import role

_LIMITS = {"hbm": "HBM", "link": "link", "compute": "compute"}
_REFUSALS_SHOWN = 12


@dataclass(frozen=True, slots=True)
class OpGroup:
    """Operators of one graph that repeat from layer to layer, summed."""

    label: str  # "model.layers.*.mlp.up_proj"
    kind: str
    m: int
    count: int
    lowest_share: float
    highest_share: float
    local_bytes: float  # read per step
    remote_bytes: float
    time: float  # of all of them
    limits: str
    source: str
    measured: float | None  # of all of them, where each was
    strategies: str  # of those that have remote bytes
    kernels: str

    @classmethod
    def of(cls, label: str, ops: Sequence[OpPlan], notes: OpNotes) -> OpGroup:
        """The sums over `ops`, of which there is at least one."""
        shares = [op.remote_share for op in ops]
        keys = list(dict.fromkeys((op.graph, op.op) for op in ops))
        known = [notes.seconds.get(key) for key in keys]
        return cls(
            label=label,
            kind=ops[0].kind,
            m=ops[0].m,
            count=len(ops),
            lowest_share=min(shares),
            highest_share=max(shares),
            local_bytes=sum(op.local_bytes for op in ops),
            remote_bytes=sum(op.remote_bytes for op in ops),
            time=sum(op.time for op in ops),
            limits=", ".join(
                name for key, name in _LIMITS.items() if key in {o.limit for o in ops}
            ),
            source=ops[0].source.rsplit("/", 1)[-1],
            measured=None if None in known else sum(seconds or 0.0 for seconds in known),
            strategies=_each(notes.strategies.get(key) for key in keys),
            kernels=_each(notes.kernels.get(key) for key in keys),
        )


def _each(texts: Iterable[str | None]) -> str:
    return ", ".join(dict.fromkeys(filter(None, texts)))


def group_ops(
    ops: Iterable[OpPlan], *, all_ops: bool = False, notes: OpNotes | None = None
) -> list[OpGroup]:
    """Rows of the report, in order of first appearance; one operator each with `all_ops`."""
    groups: dict[tuple[object, ...], list[OpPlan]] = {}
    for number, op in enumerate(ops):
        name = op.module or op.tensor.removesuffix(".weight") or op.op
        label = name if all_ops else role(name)
        key = (label, op.kind, op.m, number if all_ops else -1)
        groups.setdefault(key, []).append(op)
    known = notes or OpNotes()
    return [OpGroup.of(str(key[0]), members, known) for key, members in groups.items()]


def render(
    plan: Plan,
    *,
    title: str = "",
    all_ops: bool = False,
    notes: OpNotes | None = None,
) -> RenderableType:
    """The whole report for a rich console.

    Args:
        plan: what to report.
        title: first line; by default model, hardware and tier.
        all_ops: one row per operator instead of one per group of equal layers.
        notes: what is known of operators besides, in columns of their own where there is room.
    """
    parts: list[RenderableType] = [Text(title or _title(plan), style="bold"), Text(_placed(plan))]
    for graph in plan.step_times:
        parts += [Text(), _GraphTable(plan, graph, all_ops, notes)]
    if plan.refusals:
        parts += [Text(), _refusal_table(plan.refusals, all_ops)]
    parts += [Text(), Text("\n".join(_summary(plan)))]
    return Group(*parts)


def _title(plan: Plan) -> str:
    return f"{plan.model or 'model'} on {plan.hardware}, remote tier {plan.remote}"


def _placed(plan: Plan) -> str:
    total, remote = plan.total_bytes, plan.remote_bytes
    sizes = plan.sizes
    split = sum(0 < part < sizes[name] for name, part in plan.splits.items())
    whole = sum(0 < part == sizes[name] for name, part in plan.splits.items())
    share = remote / total if total else 0.0
    return (
        f"{bytes_text(remote)} of {bytes_text(total)} planned bytes remote ({share:.1%}): of "
        f"{count_text(len(sizes), 'tensor')} {whole} whole, {split} in part"
    )


def _share_text(group: OpGroup) -> str:
    low, high = f"{group.lowest_share:.1%}", f"{group.highest_share:.1%}"
    return low if low == high else f"{low[:-1]}-{high}"


class _GraphTable:
    """The operators of one graph; a narrow console gets fewer columns."""

    def __init__(
        self,
        plan: Plan,
        graph: str,
        all_ops: bool,
        notes: OpNotes | None = None,
    ) -> None:
        self.step = plan.step_times[graph]
        self.title = f"{graph}: {seconds_text(self.step)} predicted"
        self.title += f", {seconds_text(plan.bound[graph])} bound"
        ops = (op for op in plan.ops if op.graph == graph)
        self.groups = group_ops(ops, all_ops=all_ops, notes=notes)
        self.all_ops, self.noted = all_ops, notes is not None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        local = sum(group.local_bytes for group in self.groups)
        remote = sum(group.remote_bytes for group in self.groups)
        total = _Row(
            operator="total",
            operators=str(sum(group.count for group in self.groups)),
            remote=f"{remote / (local + remote):.1%}" if local + remote else "",
            HBM=bytes_text(local),
            link=bytes_text(remote),
            time=seconds_text(self.step),
        )
        rows = [_row(group, self.step) for group in self.groups]
        names = self._names(options.max_width, any(row.measured for row in rows))
        table = Table(
            title=self.title,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            show_footer=True,
            padding=(0, 1, 0, 0),
        )
        for name in names:
            folds = name in ("operator", "source")
            table.add_column(
                "count" if name == "operators" else name.replace("_", " "),
                Text(getattr(total, name)),
                justify="left" if folds or name in _TEXTS else "right",
                no_wrap=not folds,
                overflow="fold" if folds else "ellipsis",
                min_width=16 if folds else None,
            )
        for row in rows:
            table.add_row(*(Text(getattr(row, name)) for name in names))
        yield table

    def _names(self, width: int, measured: bool) -> tuple[str, ...]:
        wide = _WIDE_COLUMNS + (_NOTES_COLUMNS if self.noted else 0)
        names = _NARROW if width < wide else _WIDE
        if self.noted and width >= _WIDE_COLUMNS:
            names = (*names, *(("measured",) if measured else ()), "strategy", "kernel")
        elif self.noted:
            names = (*names, "strategy")
        if self.all_ops or (self.noted and width >= _SOURCE_COLUMNS):
            names = (*names, "source")
        return names


class _Row(NamedTuple):
    operator: str
    kind: str = ""
    operators: str = ""
    rows: str = ""
    remote: str = ""
    HBM: str = ""
    link: str = ""
    time: str = ""
    share: str = ""
    bound_by: str = ""
    measured: str = ""
    strategy: str = ""
    kernel: str = ""
    source: str = ""


_NARROW = ("operator", "operators", "rows", "remote", "link", "time", "bound_by")
_WIDE = ("operator", "kind", "operators", "rows", "remote", "HBM", "link", "time", "share",
         "bound_by")  # fmt: skip
_TEXTS = ("kind", "bound_by", "strategy", "kernel")
_WIDE_COLUMNS, _NOTES_COLUMNS, _SOURCE_COLUMNS = 106, 30, 165


def _row(group: OpGroup, step: float) -> _Row:
    return _Row(
        operator=group.label,
        kind=group.kind,
        operators=str(group.count),
        rows=str(group.m or ""),
        remote=_share_text(group),
        HBM=bytes_text(group.local_bytes),
        link=bytes_text(group.remote_bytes),
        time=seconds_text(group.time),
        share=f"{group.time / step:.1%}" if step else "",
        bound_by=group.limits,
        measured="" if group.measured is None else seconds_text(group.measured),
        strategy=group.strategies,
        kernel=group.kernels,
        source=group.source,
    )


def _refusal_table(refusals: Sequence[Refusal], all_ops: bool) -> Table:
    title = f"not offloaded: {count_text(len(refusals), 'operator')}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("operator", "count", "where", "reason"):
        table.add_column(name, overflow="fold", justify="right" if name == "count" else "left")
    groups: dict[tuple[str, str, str], list[Refusal]] = {}
    for refusal in refusals:
        where = refusal.module or refusal.node
        where = where if all_ops else role(where)
        groups.setdefault((refusal.target, where, refusal.reason), []).append(refusal)
    rows = list(groups.items())
    for (target, where, reason), members in rows if all_ops else rows[:_REFUSALS_SHOWN]:
        source = members[0].source.rsplit("/", 1)[-1]
        place = f"{where} ({source})" if source else where
        table.add_row(*map(Text, (target, str(len(members)), place, reason)))
    hidden = 0 if all_ops else len(rows) - _REFUSALS_SHOWN
    if hidden > 0:
        table.add_row(Text(f"and {count_text(hidden, 'more kind')}"), "", "", "")
    return table


def _summary(plan: Plan) -> list[str]:
    names = {"prefill": "TTFT (prefill)", "decode": "TPOT (decode step)"}
    lines = []
    for graph, step in plan.step_times.items():
        line = f"{names.get(graph, graph)}: predicted {seconds_text(step)}"
        bound = plan.bound[graph]
        if bound:
            line += f"; {step / bound:.2f}x of what HBM, link and cores could do with these bytes"
        lines.append(line)
    lines.append(f"plan: {max(plan.gap, 0.0):.3%} above the best possible split of the same bytes")
    return lines
