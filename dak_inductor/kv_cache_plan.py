"""Where a new KV cache lies: weighed against its model's weights, or as asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from dak_inductor import hardware, placement, replanning
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.errors import BudgetError
from dak_inductor.kv_cache_geometry import CacheGeometry
from dak_inductor.kv_cache_storage import CacheStorage
from dak_inductor.kv_cache_tensors import TensorPlan, decode_uses
from dak_inductor.offloaded import note_change
from dak_inductor.offloaded_model import OffloadedModel
from dak_inductor.page_fit import plan_in_pages
from dak_inductor.plan import OpUse, Plan, PlanProblem, TensorSpec
from dak_inductor.planner import make_plan
from dak_inductor.session import SESSION


def splits_by_ratio(
    geometry: CacheGeometry,
    plans: Sequence[TensorPlan],
    ratio: float,
    *,
    tier: Tier,
    device: torch.device,
    expected: int,
) -> dict[str, int]:
    """Local bytes of each tensor with `ratio` of all bytes remote: what is read last goes first."""
    total = sum(plan.nbytes for plan in plans)
    problem = PlanProblem(
        tensors=_specs(plans, tier),
        uses=_uses(geometry, plans, expected),
        remote_bytes=round(ratio * total),
        remote=tier.name,
    )
    return _local(make_plan(problem, hardware.current(device)), plans)


def place_with_weights(
    record: OffloadedModel,
    geometry: CacheGeometry,
    plans: Sequence[TensorPlan],
    *,
    expected: int,
) -> CacheStorage:
    """A cache under the budget of an offloaded model, whose weights make room for it.

    Raises BudgetError, MoveError, HostMemoryError; nothing is changed then. The caller holds the
    launch lock.
    """
    problem = replanning.problem_of(record, SESSION.bindings())
    problem = replace(
        problem,
        tensors=(*problem.tensors, *_specs(plans, record.tier)),
        uses=(*problem.uses, *_uses(geometry, plans, expected)),
    )
    plan = _within_budget(record, problem, plans)
    storage = CacheStorage(
        geometry,
        record.tier,
        record.device,
        plans,
        _local(plan, plans),
        fixed=False,
        expected=expected,
    )
    before = record.plan
    join(record, storage)
    try:
        placement.apply(_as_allocated(plan, storage), record)
    except BaseException:
        record.caches.discard(storage)
        record.plan = before
        raise
    record.plan = plan
    return storage


def join(record: OffloadedModel, storage: CacheStorage) -> None:
    """Let a cache share the budget of a model."""
    record.caches.add(storage)
    note_change()


def _within_budget(
    record: OffloadedModel, problem: PlanProblem, plans: Sequence[TensorPlan]
) -> Plan:
    profile = hardware.current(record.device)
    total = sum(spec.nbytes for spec in problem.tensors)
    if record.offload_ratio is not None:
        raise AssertionError("a model with a ratio has no budget to share")
    available = record.budget.weight_bytes_available(record)
    wanted = max(problem.remote_bytes, total - available, 0)
    try:
        plan, held = plan_in_pages(
            problem, profile, lambda plan: _held(record, plan, plans),
            available=available, page_bytes=record.tier.page_bytes, wanted=wanted, most=total,
        )  # fmt: skip
    except BudgetError as error:
        raise BudgetError(f"{_asked(plans)} under {_limit(record)}: {error}") from error
    if held > available:
        raise BudgetError(
            f"{_asked(plans)} under {_limit(record)}: weights and cache hold {held:,} bytes of "
            f"pages there at least, and {available:,} are left for them. Raise gpu_memory by "
            f"{held - available:,} bytes, or make the cache smaller."
        )
    return plan


def _held(record: OffloadedModel, plan: Plan, plans: Sequence[TensorPlan]) -> int:
    """Bytes of local pages that weights and caches would hold under a plan."""
    held = 0
    for tensor in record.tensors():
        buffer = tensor.buffer
        split = buffer.nearest_split(buffer.nbytes - plan.splits[tensor.name])
        held += buffer.local_pages(split) * buffer.page_bytes
    for new in plans:
        held += record.tier.held_bytes(new.nbytes, new.nbytes - plan.splits[new.name]).local
    return held


def _as_allocated(plan: Plan, storage: CacheStorage) -> Plan:
    """The plan with the cache's splits as they are, rounded to whole tokens."""
    exact = {t.name: t.buffer.nbytes - t.buffer.split for t in storage.tensors}
    return replace(plan, splits={**plan.splits, **exact})


def _specs(plans: Sequence[TensorPlan], tier: Tier) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            plan.name,
            plan.nbytes,
            granularity=plan.nbytes if tier.whole_tensors else plan.row_bytes,
        )
        for plan in plans
    )


def _uses(geometry: CacheGeometry, plans: Sequence[TensorPlan], expected: int) -> tuple[OpUse, ...]:
    uses = decode_uses(geometry, [(plan.name, plan.nbytes) for plan in plans])
    shares = [min(plan.capacity, max(1, expected)) / plan.capacity for plan in plans]
    return tuple(
        replace(use, touched_bytes=use.touched_bytes * share, untouched_share=1 - share)
        for use, share in zip(uses, shares, strict=True)
    )


def _local(plan: Plan, plans: Sequence[TensorPlan]) -> dict[str, int]:
    return {new.name: new.nbytes - plan.splits[new.name] for new in plans}


def _asked(plans: Sequence[TensorPlan]) -> str:
    return f"a KV cache of {sum(plan.nbytes for plan in plans):,} bytes"


def _limit(record: OffloadedModel) -> str:
    return f"gpu_memory={record.budget.limit:,}"
