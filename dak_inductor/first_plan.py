"""The plan of a model when it is offloaded: within budget, before any graph was seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from dak_inductor import hardware
from dak_inductor.ahead_room import expected_ring
from dak_inductor.budget import BudgetTerms, DeviceBudget
from dak_inductor.copied_rows import row_block
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.default_plan import uses_of
from dak_inductor.errors import BudgetError, ModelError
from dak_inductor.inventory import LARGE_BUFFER_BYTES, Entry, Inventory
from dak_inductor.offload_request import OffloadRequest
from dak_inductor.page_fit import plan_in_pages
from dak_inductor.patterns import placed_entries
from dak_inductor.plan import OpUse, Plan, PlanProblem, TensorSpec
from dak_inductor.plan_file import load_plan
from dak_inductor.planner import make_plan


@dataclass(frozen=True, slots=True)
class FirstPlan:
    """A plan and what it was made from; `held` are the bytes of the pages that it takes."""

    plan: Plan
    specs: Mapping[str, TensorSpec]
    uses: tuple[OpUse, ...]
    held: TierBytes

    def remote_bytes(self, name: str) -> int:
        return self.plan.splits[name]


def make_first_plan(
    model: nn.Module,
    inventory: Inventory,
    request: OffloadRequest,
    tier: Tier,
    budget: DeviceBudget,
) -> FirstPlan:
    """The plan to allocate by. Changes nothing.

    Raises ModelError, BudgetError, PatternError, PlanError or ProfileError.
    """
    _check_divisible(inventory, request, tier)
    specs = tensor_specs(inventory, request, tier)
    uses = uses_of(inventory, model)
    terms = budget_terms(inventory, budget)
    problem = PlanProblem(
        tensors=tuple(specs.values()),
        uses=uses,
        remote_bytes=0,
        remote=request.remote,
        refusals=tuple(inventory.refusals),
        model=inventory.fingerprint,
        ring_bytes=expected_ring(budget),
    )

    def fitting(plan: Plan, why: str) -> FirstPlan:
        held = held_bytes(tier, specs.values(), plan)
        if held.local > terms.available:
            raise BudgetError(_too_small(request, inventory, terms, held.local, why))
        return FirstPlan(plan, specs, uses, held)

    if request.plan is not None:
        sizes = {spec.name: spec.nbytes for spec in specs.values()}
        plan = load_plan(request.plan).fitted(inventory.fingerprint, sizes)
        return fitting(plan, "the plan keeps")
    profile = hardware.current(budget.device)
    if request.offload_ratio is not None:
        wanted = round(request.offload_ratio * inventory.tierable_bytes)
        plan = make_plan(replace(problem, remote_bytes=wanted), profile)
        return fitting(plan, "the ratio keeps")
    movable = sum(
        spec.nbytes if spec.max_remote is None else spec.max_remote for spec in specs.values()
    )
    fixed = inventory.tierable_bytes - movable
    if terms.available < fixed or terms.available < 0:
        raise BudgetError(_too_small(request, inventory, terms, fixed, "patterns keep"))
    wanted = max(0, inventory.tierable_bytes - terms.available)
    plan, _ = plan_in_pages(
        problem, profile, lambda plan: held_bytes(tier, specs.values(), plan).local,
        available=terms.available, page_bytes=tier.page_bytes, wanted=wanted, most=movable,
    )  # fmt: skip
    return fitting(plan, "rounded to pages, there stay")


def _check_divisible(inventory: Inventory, request: OffloadRequest, tier: Tier) -> None:
    """Raises ModelError where something is to be remote and nothing can be."""
    if inventory.entries or not (request.offload_ratio or request.placement):
        return
    parameters = [entry.nbytes for entry in inventory.resident if entry.is_parameter]
    buffers = [entry.nbytes for entry in inventory.resident if not entry.is_parameter]
    raise ModelError(
        f"nothing of {inventory.label} can be divided: its largest parameter has "
        f"{max(parameters, default=0):,} bytes and its largest buffer "
        f"{max(buffers, default=0):,}; parameters below {request.minimum_bytes(tier):,} and "
        f"buffers below {LARGE_BUFFER_BYTES:,} stay whole on the GPU"
    )


def tensor_specs(
    inventory: Inventory, request: OffloadRequest, tier: Tier
) -> dict[str, TensorSpec]:
    """What the planner may do with each divided tensor, by name."""
    places = placed_entries(request.placement, inventory, request.remote)
    specs = {}
    for entry in inventory.entries:
        place = places.get(entry.name)
        specs[entry.name] = TensorSpec(
            name=entry.name,
            nbytes=entry.nbytes,
            min_remote=entry.nbytes if place == "remote" else 0,
            max_remote=0 if place == "gpu" else None,
            granularity=entry.nbytes if tier.whole_tensors else 256,
            row_block=0 if tier.whole_tensors else row_block(entry),
        )
    return specs


def held_bytes(tier: Tier, specs: Iterable[TensorSpec], plan: Plan) -> TierBytes:
    """Bytes of the pages that new buffers would take under `plan`."""
    return sum(
        (tier.held_bytes(spec.nbytes, spec.nbytes - plan.splits[spec.name]) for spec in specs),
        TierBytes(),
    )


def peak_host_bytes(tier: Tier, inventory: Inventory, first: FirstPlan) -> int:
    """The most host memory taken beyond today's while entries move in order, originals released."""
    taken = peak = 0
    for entry in inventory.entries:
        split = entry.nbytes - first.remote_bytes(entry.name)
        taken += tier.held_bytes(entry.nbytes, split).remote
        peak = max(peak, taken)
        taken -= entry.nbytes if entry.device.type == "cpu" else 0
    return peak


def budget_terms(inventory: Inventory, budget: DeviceBudget) -> BudgetTerms:
    """How the budget is spent once the model's whole tensors have come to the device."""
    if budget.is_simulated:
        return budget.terms(arriving=inventory.resident_bytes)
    return budget.terms(
        arriving=_bytes_at(inventory.resident, budget.device, there=False),
        leaving=_bytes_at(inventory.entries, budget.device, there=True),
    )


def _bytes_at(entries: Iterable[Entry], device: torch.device, *, there: bool) -> int:
    return sum(entry.nbytes for entry in entries if (entry.device == device) is there)


def _too_small(
    request: OffloadRequest, inventory: Inventory, terms: BudgetTerms, needed: int, why: str
) -> str:
    short = needed - terms.available
    asked = (
        "" if request.gpu_memory is None else f"gpu_memory={request.gpu_memory!r} is too small: "
    )
    return (
        f"{asked}{terms}: {terms.available:,} bytes are left for weights that can be divided, and "
        f"{why} {needed:,} bytes of {inventory.label} on the GPU. Give at least "
        f"{(terms.total + short) / 1e9:.3f} GB ({terms.total + short:,} bytes)."
    )
