"""`dak.explain(model)`: what went where, why, what it costs, what serves it, what was refused."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console, Group

from dak_inductor import ahead_report, hardware, plan_report, template_report, trial_report
from dak_inductor.ahead_report import EAGER, StepStrategy
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.errors import ModelError
from dak_inductor.hardware_profile import HardwareProfile
from dak_inductor.link_window import LinkWindow, window_changes, window_in_force
from dak_inductor.lowering.linear.trials import Trial
from dak_inductor.measured_ops import measured_seconds
from dak_inductor.memory_curve import MemoryPoint, memory_curve
from dak_inductor.memory_curve import render as render_curve
from dak_inductor.offloaded import record_of
from dak_inductor.offloaded_model import find_resident_copies
from dak_inductor.op_notes import OpKey, OpNotes
from dak_inductor.plan import OpPlan, Plan, PlanProblem
from dak_inductor.planner import make_plan
from dak_inductor.quantity_text import bytes_text, count_text
from dak_inductor.replanning import problem_of
from dak_inductor.report.window_history import WindowUpdate, updates_of
from dak_inductor.session import SESSION
from dak_inductor.template_report import OpTemplate, templates_of
from dak_inductor.tensor_names import few_of

_WIDTH = 172
"""Of `str()`: room for every column of the operators of a Llama."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """The plan as it stands, what serves each operator of the graphs seen, which products' remote
    bytes are copied ahead, and what this process has measured of products over the same link.

    The plan's times are those of direct reads; a step whose products are copied ahead has its own
    prediction in `strategies`. `measured` are times of products of which a trial was made.
    `window_history` is what kernels made of a window that is automatic. `replaced` names weights
    that are planned but were replaced by tensors that lie whole on the device.

    `str()` gives the report; rich renders it as tables.
    """

    label: str
    device: str
    remote: str
    placed: TierBytes
    resident_bytes: int
    graphs: int
    plan: Plan
    templates: tuple[OpTemplate, ...] = ()
    window: LinkWindow | None = None
    caches: TierBytes = field(default_factory=TierBytes)
    trials: tuple[Trial, ...] = ()
    curve: tuple[MemoryPoint, ...] = ()
    strategies: tuple[StepStrategy, ...] = ()
    measured: Mapping[OpKey, float] = field(default_factory=dict)
    window_history: tuple[WindowUpdate, ...] = ()
    replaced: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.to_text()

    def __rich__(self) -> Any:
        return self._tables(all_ops=False)

    def to_text(self, *, all_ops: bool = False, width: int = _WIDTH) -> str:
        """The report; with `all_ops` a row for every operator, which `str()` sums over layers."""
        written = io.StringIO()
        console = Console(file=written, width=width, color_system=None, force_terminal=False)
        console.print(self._tables(all_ops=all_ops))
        return "\n".join(line.rstrip() for line in written.getvalue().splitlines())

    def _tables(self, *, all_ops: bool) -> Group:
        title, notes = self._title(), self.notes
        parts = [plan_report.render(self.plan, title=title, all_ops=all_ops, notes=notes)]
        if self.curve:
            parts.append(render_curve(self.curve))
        if self.templates:
            parts.append(template_report.render(self.templates))
        if self.strategies:
            parts.append(ahead_report.render(self.strategies))
        if self.trials:
            parts.append(trial_report.render(self.trials))
        return Group(*parts, *([str(self.window)] if self.window else []))

    @property
    def notes(self) -> OpNotes:
        """What is known of each operator besides its plan. Strategies are those of the steps that
        were planned, in CUDA graphs where the two differ; the plan's for operators of others."""
        steps: dict[str, dict[str, str]] = {}
        for step in self.strategies:
            if step.where != EAGER:
                own = steps.setdefault(step.graph, {})
                own.update((name, op.strategy) for op in step.ops for name in op.tensors)
        strategies: dict[OpKey, str] = {}
        for op in self.plan.ops:
            if op.remote_share:
                key, told = (op.graph, op.op), _strategy(op, steps.get(op.graph))
                strategies[key] = max(told, strategies.get(key, told))  # staged, if one weight is
        kernels = {(op.graph, op.op): op.template for op in self.templates}
        return OpNotes(self.measured, strategies, kernels)

    def to_html(self) -> str:
        """The same as one HTML page that loads nothing, with every operator and its source line."""
        from dak_inductor.report.explanation_page import explanation_page

        return explanation_page(self, self._title())

    def _title(self) -> str:
        seen = (
            f"{count_text(self.graphs, 'graph')} seen"
            if self.graphs
            else "no graph seen yet: every weight counts once"
        )
        return (
            f"{self.label}: {bytes_text(self.placed.local)} of tiered weights on {self.device}, "
            f"{bytes_text(self.placed.remote)} in {self.remote}, "
            f"{bytes_text(self.resident_bytes)} kept whole{self._caches()}; {seen}"
            f"{self._replaced()}"
        )

    def _replaced(self) -> str:
        if not self.replaced:
            return ""
        return (
            "; replaced (.half(), .to(), assign=True) by tensors that lie whole on the device, so "
            f"that nothing of them is offloaded: {few_of(self.replaced)}"
        )

    def _caches(self) -> str:
        if not self.caches.total:
            return ""
        return (
            f"; KV cache at full length {bytes_text(self.caches.local)} and "
            f"{bytes_text(self.caches.remote)}"
        )


def _strategy(op: OpPlan, of_step: Mapping[str, str] | None) -> str:
    return op.strategy if of_step is None else of_step.get(op.tensor, "direct")


def explain(model: torch.nn.Module) -> Explanation:
    """Where the bytes of an offloaded model are now, and what each operator should cost there.

    Raises:
        ModelError: the model is not offloaded.
    """
    record = record_of(model)
    if record is None:
        raise ModelError(
            f"{type(model).__name__} is not offloaded; call dak.offload(model, ...) first"
        )
    placed, planned = record.bytes_by_tier(), record.planned_bytes()
    ours, seen = record.buffer_ids(), SESSION.bindings()
    bindings = [binding for binding in seen if binding.reads_any(ours)]
    problem, profile = problem_of(record, seen), hardware.current(record.device)
    tables = {binding.graph: binding.table for binding in bindings}
    asked = [binding.window for binding in bindings if binding.window is not None]
    plan = _as_placed(problem, profile)
    trials = trial_report.trials_of(record.device, record.remote)
    shapes = {name: weight.shape for name, weight in record.weights.items()}
    return Explanation(
        label=record.label,
        device=str(record.device),
        remote=record.remote,
        placed=placed,
        caches=TierBytes(planned.local - placed.local, planned.remote - placed.remote),
        resident_bytes=record.resident_bytes,
        graphs=len(tables),
        plan=plan,
        templates=tuple(op for item in tables.items() for op in templates_of(*item)),
        window=window_in_force(record.device, record.remote, asked),
        trials=trials,
        curve=_curve(problem, profile),
        strategies=ahead_report.strategies_of(bindings),
        measured=measured_seconds(plan, trials, shapes),
        window_history=updates_of(window_changes(record.device, record.remote)),
        replaced=tuple(find_resident_copies(record)),
    )


def _remote_now(problem: PlanProblem) -> int:
    return sum(spec.current_remote or 0 for spec in problem.tensors)


def _curve(problem: PlanProblem, profile: HardwareProfile) -> tuple[MemoryPoint, ...]:
    """Empty where nothing is remote."""
    remote = _remote_now(problem)
    return memory_curve(problem, profile, remote) if remote else ()


def _as_placed(problem: PlanProblem, profile: HardwareProfile) -> Plan:
    """The operators' costs with the splits as they are, not as a new plan would have them."""
    fixed = tuple(
        replace(
            spec,
            min_remote=spec.current_remote or 0,
            max_remote=spec.current_remote or 0,
            page=None,
            first_page_split=None,
            granularity=1,
        )
        for spec in problem.tensors
    )
    as_placed = replace(problem, tensors=fixed, remote_bytes=_remote_now(problem))
    return make_plan(as_placed, profile)
