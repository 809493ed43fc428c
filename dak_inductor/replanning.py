"""When a plan is made again, from what, and whether its moves pay."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from dak_inductor import hardware, placement
from dak_inductor.ahead_room import copies_help, expected_ring
from dak_inductor.binding import Binding
from dak_inductor.copy_ring import expected_ring_bytes, ring_within
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.default_plan import default_uses
from dak_inductor.expected_calls import expected_calls
from dak_inductor.move_gain import gain_by_steps, gain_of, gains_by_graph
from dak_inductor.offloaded_model import OffloadedModel
from dak_inductor.plan import OpUse, Plan, PlanProblem
from dak_inductor.plan_basis import basis_of
from dak_inductor.plan_file import load_plan
from dak_inductor.planner import make_plan
from dak_inductor.refusal import Refusal

log = logging.getLogger(__name__)

# Calls at which a binding's plan is looked at again: the first, then at ever longer intervals.
_DUE = frozenset(16**power for power in range(12))


def is_due(binding: Binding) -> bool:
    """True at calls 1, 16, 256, ... of a binding, and when a size grew past all earlier calls."""
    return binding.calls in _DUE or binding.grew


def problem_of(model: OffloadedModel, bindings: Iterable[Binding]) -> PlanProblem:
    """What the planner is asked for one model: its tensors, operators seen so far, and budget.

    A weight that no graph has read yet is taken to be read once per call of the busiest graph:
    blocks that are compiled one by one are seen one by one.
    """
    names = {id(tensor.buffer): tensor.name for tensor in model.tensors()}
    uses: list[OpUse] = []
    refusals: dict[tuple[str, str], Refusal] = {}
    bindings = list(bindings)
    for binding, calls in zip(bindings, expected_calls(bindings), strict=True):
        bound = {
            index: names[id(buffer)]
            for index, buffer in binding.live_buffers().items()
            if id(buffer) in names
        }
        if not bound:
            continue
        uses.extend(
            binding.table.uses(bound, graph=binding.graph, calls=calls, values=binding.values)
        )
        for refusal in binding.table.refusals:
            refusals[binding.graph, refusal.node] = replace(refusal, graph=binding.graph)
    for cache in model.caches:
        uses = [cache.as_expected(use) for use in uses]
    seen = {use.tensor for use in uses}
    most = max((use.calls for use in uses), default=1.0)
    assumed = [*default_uses(model), *(u for cache in model.caches for u in cache.default_uses())]
    uses.extend(replace(u, calls=most) for u in assumed if u.tensor not in seen)
    return PlanProblem(
        tensors=model.specs(),
        uses=tuple(uses),
        remote_bytes=model.required_remote_bytes(),
        remote=model.remote,
        refusals=(*model.refusals, *refusals.values()),
        model=model.fingerprint,
        ring_bytes=ring_bytes(model, bindings),
    )


def ring_bytes(model: OffloadedModel, bindings: Iterable[Binding]) -> int:
    """Of the ring of copies ahead that serves this model; 0 where a graph of it that was called has
    none. Before the first call the environment says so, afterwards the options of its graphs do."""
    own = model.buffer_ids()
    called = [
        binding.ahead
        for binding in bindings
        if binding.ahead is not None and binding.reads_any(own)
    ]
    if not called:
        return expected_ring(model.budget)
    if not copies_help(model.device) or any(steps.never for steps in called):
        return 0
    rooms = [steps.ring.least for steps in called if steps.ring.least is not None]
    return ring_within(min(rooms, default=expected_ring_bytes(model.budget.limit)))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Of Python's garbage: what planning makes goes by itself, but its tens of thousands of objects
    would bring on a collection, which looks at all that the process has. In one that has compiled a
    model that took 240 ms."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_collection()
def replan(
    model: OffloadedModel,
    bindings: Sequence[Binding],
    *,
    user_plan: Plan | str | None = None,
    measured: bool = True,
) -> placement.MoveReport | None:
    """Plan again and move, if the budget asks for it or the predicted gain pays for the moves.

    Called at a step boundary; `measured` says that a step has run, whose peak of memory then takes
    the place of the estimate. Where all is as when a plan changed nothing, none is made. Returns
    what was moved, or None. The caller holds the launch lock.
    """
    caches = list(model.caches)  # none goes, in another thread, between the plan and its moves
    if measured:
        for change in model.budget.measure():
            log.info("%s", change)
    profile = hardware.current(model.device)
    basis = None
    if user_plan is None:
        basis = basis_of(model, bindings, ring_bytes(model, bindings), profile)
    if basis is not None and basis == model.settled:
        return None
    model.settled = None
    problem = problem_of(model, bindings)
    short = problem.remote_bytes - sum(spec.current_remote or 0 for spec in problem.tensors)
    in_graphs = _is_in_graphs(model, bindings)
    if in_graphs and short > 0:
        problem = _none_back(problem)
    plan = users_plan(user_plan, model) if user_plan is not None else make_plan(problem, profile)
    model.plan = plan
    if not differs(model, plan):
        model.settled = basis
        return None
    moved = bytes_to_move(model, plan)
    if user_plan is None and short <= 0:
        if in_graphs:
            log.info(
                "%s: plan kept: CUDA graphs that Inductor captured copy the parts of now, and no "
                "move is needed",
                model.label,
            )
            return None
        gains = gains_by_graph(problem, plan, profile)
        gain = gain_of(gains)
        cost = moved / profile.link(model.remote).copy_bandwidth
        if gain > cost:  # steps are planned in milliseconds
            splits = {id(buffer): split for buffer, split in _wanted(model, plan)}
            gain = min(gain, gain_by_steps(gains, bindings, splits))
        if gain <= cost:
            log.debug("plan kept: moving %.3f GB would take %.1f ms and gain %.1f ms",
                      moved / 1e9, cost * 1e3, gain * 1e3)  # fmt: skip
            return None
    report = placement.apply(plan, model)
    del caches
    log.info(
        "%s: moved %.3f GB to the remote tier and %.3f GB back in %.1f ms",
        model.label, report.bytes_to_remote / 1e9, report.bytes_to_local / 1e9, report.seconds *
        1e3,
    )  # fmt: skip
    return report


def _is_in_graphs(model: OffloadedModel, bindings: Iterable[Binding]) -> bool:
    """After a move their results would be right, and rows copied or read that need not be; Inductor
    captures them once."""
    own = model.buffer_ids()
    return any(
        binding.is_compiled
        and binding.ahead is not None
        and binding.ahead.in_graphs
        and binding.reads_any(own)
        for binding in bindings
    )


def _none_back(problem: PlanProblem) -> PlanProblem:
    """With all that is remote to stay there, so that no more is moved than has to leave."""
    tensors = tuple(replace(t, min_remote=t.current_remote or 0) for t in problem.tensors)
    return replace(problem, tensors=tensors)


def users_plan(plan: Plan | str, model: OffloadedModel) -> Plan:
    """A plan of the user's, checked against the model. Raises PlanError."""
    sizes = {tensor.name: tensor.buffer.nbytes for tensor in model.tensors()}
    return with_caches(load_plan(plan), model).fitted(model.fingerprint, sizes)


def with_caches(plan: Plan, model: OffloadedModel) -> Plan:
    """A plan made before the model had its caches leaves them where they are."""
    missing = [t.buffer for t in model.tensors() if t.name not in plan.sizes]
    caches = {buffer.label: buffer for buffer in missing if buffer.label not in model.weights}
    return replace(
        plan,
        splits={**plan.splits, **{name: b.nbytes - b.split for name, b in caches.items()}},
        sizes={**plan.sizes, **{name: b.nbytes for name, b in caches.items()}},
    )


def differs(model: OffloadedModel, plan: Plan) -> bool:
    """Whether the plan changes any split, also one that is not committed that far."""
    return any(wanted != buffer.split for buffer, wanted in _wanted(model, plan))


def bytes_to_move(model: OffloadedModel, plan: Plan) -> int:
    """Bytes in memory whose tier the plan changes."""
    return sum(
        abs(min(wanted, buffer.committed) - min(buffer.split, buffer.committed))
        for buffer, wanted in _wanted(model, plan)
    )


def _wanted(model: OffloadedModel, plan: Plan) -> Iterator[tuple[TieredBuffer, int]]:
    """Each buffer and the split that the plan gives it."""
    for tensor in model.tensors():
        buffer = tensor.buffer
        yield buffer, buffer.nearest_split(buffer.nbytes - plan.splits[tensor.name])
