"""`dak.explain(model)`: what went where, why, what it costs, and what was refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from dak_inductor import hardware, plan_report
from dak_inductor.cuda_runtime.tier_buffer import TierBytes
from dak_inductor.errors import ModelError
from dak_inductor.offloaded import OffloadedModel, record_of
from dak_inductor.plan import Plan
from dak_inductor.plan_report import bytes_text
from dak_inductor.planner import make_plan
from dak_inductor.replanning import problem_of
from dak_inductor.session import SESSION


@dataclass(frozen=True, slots=True)
class Explanation:
    """The plan as it stands. `str()` gives the report; rich renders it as tables."""

    label: str
    device: str
    remote: str
    placed: TierBytes
    resident_bytes: int
    graphs: int
    plan: Plan

    def __str__(self) -> str:
        return plan_report.to_text(self.plan, title=self._title())

    def __rich__(self) -> Any:
        return plan_report.render(self.plan, title=self._title())

    def _title(self) -> str:
        seen = (
            f"{self.graphs} graphs seen"
            if self.graphs
            else "no graph seen yet: every weight counts once"
        )
        return (
            f"{self.label}: {bytes_text(self.placed.local)} of tiered weights on {self.device}, "
            f"{bytes_text(self.placed.remote)} in {self.remote}, "
            f"{bytes_text(self.resident_bytes)} kept whole; {seen}"
        )


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
    bindings = [binding for binding in SESSION.bindings() if binding.names]
    return Explanation(
        label=record.label,
        device=str(record.device),
        remote=record.remote,
        placed=sum((w.buffer.bytes_by_tier() for w in record.weights.values()), TierBytes()),
        resident_bytes=record.resident_bytes,
        graphs=len({binding.graph for binding in bindings}),
        plan=_as_placed(record),
    )


def _as_placed(record: OffloadedModel) -> Plan:
    """The operators' costs with the splits as they are, not as a new plan would have them."""
    problem = problem_of(record, SESSION.bindings())
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
    placed = sum(spec.current_remote or 0 for spec in problem.tensors)
    profile = hardware.current(record.device)
    return make_plan(replace(problem, tensors=fixed, remote_bytes=placed), profile)
