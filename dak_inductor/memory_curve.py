"""What more GPU memory would buy: the same model planned again with fewer bytes remote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.table import Table

from dak_inductor.hardware_profile import HardwareProfile
from dak_inductor.plan import PlanProblem
from dak_inductor.planner import make_plan
from dak_inductor.quantity_text import bytes_text, seconds_text

_GIB = 1 << 30
_GRAPHS_SHOWN = 4


@dataclass(frozen=True, slots=True)
class MemoryPoint:
    """A plan with `more_bytes` of the tensors moved to the GPU.

    `remote_bytes` stay remote; `step_times` are predicted seconds by graph.
    """

    more_bytes: int
    remote_bytes: int
    step_times: Mapping[str, float]


def memory_curve(
    problem: PlanProblem, profile: HardwareProfile, remote_bytes: int
) -> tuple[MemoryPoint, ...]:
    """Points from the `remote_bytes` of now down to what has to be remote.

    By powers of two from 1 GiB, or by quarters where less than 2 GiB is remote. Tensors go where a
    plan from scratch would have them, so the first point may be faster than the placement as it is.
    A step may also get slower: both memories together read faster than HBM alone. Raises as
    `make_plan`.
    """
    specs = tuple(replace(spec, current_remote=None) for spec in problem.tensors)
    fresh = replace(problem, tensors=specs)
    least = sum(spec.min_remote for spec in specs)
    points = []
    for more in (0, *_amounts(remote_bytes - least)):
        plan = make_plan(replace(fresh, remote_bytes=remote_bytes - more), profile)
        points.append(MemoryPoint(more, plan.remote_bytes, dict(plan.step_times)))
    return tuple(points)


def _amounts(movable: int) -> tuple[int, ...]:
    if movable <= 0:
        return ()
    if movable < 2 * _GIB:
        return tuple(sorted({movable // 4, movable // 2, movable} - {0}))
    powers: list[int] = []
    while (_GIB << len(powers)) < movable:
        powers.append(_GIB << len(powers))
    return (*powers, movable)


def render(points: Sequence[MemoryPoint]) -> Table:
    """A table for a rich console: a row for each point, the slowest graphs beside each other."""
    table = Table(
        title="what more GPU memory would buy",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    slowest = sorted(points[0].step_times, key=lambda graph: -points[0].step_times[graph])
    shown = slowest[:_GRAPHS_SHOWN]
    for name in ("GPU memory", "remote", *shown):
        table.add_column(name, justify="right")
    for point in points:
        more = f"+{bytes_text(point.more_bytes)}" if point.more_bytes else "as it is"
        steps = (seconds_text(point.step_times[graph]) for graph in shown)
        table.add_row(more, bytes_text(point.remote_bytes), *steps)
    return table
