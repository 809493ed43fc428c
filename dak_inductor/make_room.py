"""Several models on one device: the earlier ones give way, so that each has its share."""

from __future__ import annotations

import gc
import logging

from dak_inductor import hardware, placement
from dak_inductor.ahead_room import expected_ring
from dak_inductor.budget import DeviceBudget
from dak_inductor.first_plan import budget_terms
from dak_inductor.inventory import Inventory
from dak_inductor.offload_request import OffloadRequest
from dak_inductor.offloaded_model import OffloadedModel
from dak_inductor.plan import PlanProblem
from dak_inductor.planner import make_plan

log = logging.getLogger(__name__)


def make_room(inventory: Inventory, request: OffloadRequest, budget: DeviceBudget) -> None:
    """Move weights of earlier models out of the GPU, if a new one gets less than its share.

    A model's share is that of its divided bytes among all. Nothing moves where the new model fits,
    or was asked for by ratio or plan. Raises MoveError; the earlier models stay usable in any case.
    """
    mine = inventory.tierable_bytes
    available = budget_terms(inventory, budget).available
    if available >= mine or not (budget.models or budget.loose_caches):
        return
    gc.collect()  # a compiled model is in a cycle of references, and holds memory until this
    others = [model for model in budget.models if model.offload_ratio is None]
    available = budget_terms(inventory, budget).available
    if request.gpu_memory is None or not others or available >= mine:
        return
    held = sum(model.claimed_bytes().local for model in others)
    theirs = sum(model.planned_bytes().total for model in others)
    share = (available + held) * mine // max(1, mine + theirs)
    short = share - available
    for model in sorted(others, key=lambda other: -other.planned_bytes().local):
        if short <= 0:
            return
        part = min(short, -(-short * model.claimed_bytes().local // max(1, held)))
        short -= give_way(model, part)
        held -= model.claimed_bytes().local


def give_way(model: OffloadedModel, nbytes: int) -> int:
    """Move at least `nbytes` more of a model's weights to the remote tier, as far as it may.

    Returns the bytes of pages that left the GPU.
    """
    specs = model.specs()
    movable = sum(s.nbytes if s.max_remote is None else s.max_remote for s in specs)
    before = model.claimed_bytes().local
    remote = min(movable, model.planned_bytes().remote + nbytes)
    problem = PlanProblem(
        tensors=specs,
        uses=model.default_uses,
        remote_bytes=remote,
        remote=model.remote,
        refusals=model.refusals,
        model=model.fingerprint,
        ring_bytes=expected_ring(model.budget),
    )
    plan = make_plan(problem, hardware.current(model.device))
    placement.apply(plan, model)
    model.plan = plan
    freed = before - model.claimed_bytes().local
    log.info("%s gives %.3f GB of the GPU to another model", model.label, freed / 1e9)
    return freed
