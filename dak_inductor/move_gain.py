"""What a plan's moves save: by the costs that it was made from, and by what the steps that are
known would do with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dak_inductor.binding import Binding
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.expected_calls import expected_calls
from dak_inductor.hardware_profile import HardwareProfile
from dak_inductor.plan import Plan, PlanProblem
from dak_inductor.planner import GraphSeconds, seconds_by_graph


def gains_by_graph(
    problem: PlanProblem, plan: Plan, profile: HardwareProfile
) -> dict[str, GraphSeconds]:
    """Seconds that the plan saves over the calls expected, against the placement as it is."""
    present = {spec.name: spec.current_remote or 0 for spec in problem.tensors}
    now = seconds_by_graph(problem, present, profile)
    then = seconds_by_graph(problem, plan.splits, profile)
    return {
        graph: GraphSeconds(
            now[graph].products - then[graph].products, now[graph].others - then[graph].others
        )
        for graph in now
    }


def gain_of(gains: Mapping[str, GraphSeconds]) -> float:
    """Their sum."""
    return sum(each.products + each.others for each in gains.values())


def gain_by_steps(
    gains: Mapping[str, GraphSeconds], bindings: Sequence[Binding], splits: Mapping[int, int]
) -> float:
    """The sum, with the products of steps that are known priced as the step would be planned:
    launches and parts of copies ahead, room in the ring, and what the link does meanwhile.

    splits: by id of a buffer, the one that the plan gives it.
    """
    saved: dict[str, float] = {}
    unknown: set[str] = set()
    for binding, calls in zip(bindings, expected_calls(bindings), strict=True):
        if binding.graph not in gains or not binding.reads_any(splits):
            continue
        now = _predicted(binding, lambda buffer: buffer.split)
        then = _predicted(binding, lambda buffer: splits.get(id(buffer), buffer.split))
        if now is None or then is None:
            unknown.add(binding.graph)
        else:
            saved[binding.graph] = saved.get(binding.graph, 0.0) + calls * (now - then)
    return sum(
        each.others + (each.products if graph in unknown else saved.get(graph, each.products))
        for graph, each in gains.items()
    )


def _predicted(binding: Binding, split_of: Callable[[TieredBuffer], int]) -> float | None:
    if binding.ahead is None or binding.device is None:
        return None
    return binding.ahead.predicted(split_of, binding.device.index)
