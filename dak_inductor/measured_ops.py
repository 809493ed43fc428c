"""Which operators of a plan were timed: trials are of kinds of products, reports of operators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dak_inductor.lowering.linear.call_facts import remote_step, token_step
from dak_inductor.lowering.linear.trials import Trial
from dak_inductor.plan import OpPlan, Plan

Shapes = Mapping[str, tuple[int, ...]]

_PLAIN = ("linear", "addmm", "matmul")
_PRODUCTS = (*_PLAIN, "linear_epilogue", "gated_linear")


def measured_seconds(
    plan: Plan, trials: Iterable[Trial], shapes: Shapes
) -> dict[tuple[str, str], float]:
    """Seconds by graph and operator: of the way that was taken, at the first call of its kind.

    A product is of a trial's kind where sizes agree, and tokens and remote bytes round to the same
    steps; two that differ in nothing but bias or activation are not told apart.

    Args:
        shapes: of the tensors, by name.
    """
    known = tuple(trials)
    uses: dict[tuple[str, str], list[OpPlan]] = {}
    for op in plan.ops if known else ():
        if op.kind in _PRODUCTS and op.tensor in shapes:
            uses.setdefault((op.graph, op.op), []).append(op)
    found = {}
    for key, each in uses.items():
        trial = next((t for t in known if _is_of_kind(each, t, plan, shapes)), None)
        if trial is not None:
            found[key] = dict(trial.seconds)[trial.chosen]
    return found


def _is_of_kind(uses: list[OpPlan], trial: Trial, plan: Plan, shapes: Shapes) -> bool:
    call, problem, kind = trial.call, trial.call.problem, uses[0].kind
    has_epilogue = call.residual or call.activation != "none"
    if problem.gated != (kind == "gated_linear"):
        return False
    if not problem.gated and has_epilogue != (kind not in _PLAIN):
        return False
    tensors = {use.tensor: use for use in uses}
    if sum(plan.sizes[name] for name in tensors) != problem.weight_bytes:
        return False
    k_axis = 0 if problem.in_out else 1
    if any(len(shapes[n]) != 2 or shapes[n][k_axis] != problem.k for n in tensors):
        return False
    remote = sum(plan.splits[name] for name in tensors)
    return token_step(uses[0].m) == token_step(problem.m) and remote_step(remote) == remote_step(
        sum(call.remote_bytes)
    )
