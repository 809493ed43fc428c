"""The planner against its bars: how long a plan takes, and how far it is from the linear program.

    python -m dak_inductor.benchmarks.bench_planner --out planner.json

Three measurements: planning 2,000 uses with and without a ring of copies ahead (best of 5); random
problems against the optimum of the linear program, before rounding and after rounding to 256 bytes;
the same problems planned again for another number of remote bytes with tensors that move by 2 MiB
pages. Needs scipy, no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dak_inductor.benchmarks.harness.planner_problems import (
    PAGE,
    decoder_problem,
    model_problem,
    moved_problem,
    on_the_grid,
    random_problem,
)
from dak_inductor.benchmarks.harness.record import (
    parent_commit,
    project_root,
    sources_sha256,
    without_folder,
)
from dak_inductor.copy_ring import LEAST_RING_BYTES, RING_BYTES
from dak_inductor.cost_model import compute_seconds, link_bandwidth, local_bandwidth, op_floor
from dak_inductor.hardware import load
from dak_inductor.hardware_profile import HardwareProfile
from dak_inductor.plan import Plan, PlanProblem
from dak_inductor.planner import make_plan

RATIOS = (0.02, 0.3, 0.9)


def linear_program(problem: PlanProblem, profile: HardwareProfile) -> float:
    """The optimum of the problem as a linear program: tensors split anywhere, uses above each line.

    Written from the formula, not with the planner's code. Seconds, floors included.
    """
    import numpy
    from scipy.optimize import linprog
    from scipy.sparse import coo_matrix

    link = profile.link(problem.remote)
    tensors = {spec.name: i for i, spec in enumerate(problem.tensors)}
    count, unit = len(tensors), 1e-6
    cost = numpy.zeros(count + len(problem.uses))
    entries: list[tuple[int, int, float]] = []
    limits: list[float] = []

    def at_least(use: int, tensor: int, slope: float, constant: float) -> None:
        # time_use >= slope * share + constant, in microseconds
        entries.append((len(limits), tensor, slope / unit))
        entries.append((len(limits), count + use, -1.0))
        limits.append(-constant / unit)

    floors = 0.0
    seen = set()
    for number, use in enumerate(problem.uses):
        cost[count + number] = use.calls
        local = use.touched_bytes / local_bandwidth(profile)
        tensor = tensors[use.tensor]
        at_least(number, tensor, -local, local + use.other_bytes / local_bandwidth(profile))
        at_least(number, tensor, use.touched_bytes / link_bandwidth(use, link), 0.0)
        at_least(number, tensor, 0.0, compute_seconds(use, profile))
        if (use.graph, use.op) not in seen:
            floors += use.calls * op_floor(use.kind, profile)
        seen.add((use.graph, use.op))
    total = max(sum(spec.nbytes for spec in problem.tensors), 1)
    rows, columns, values = zip(*entries, strict=True) if entries else ((), (), ())
    shape = (len(limits), len(cost))
    equal = numpy.zeros((1, len(cost)))
    equal[0, :count] = [spec.nbytes / total for spec in problem.tensors]
    bounds: list[tuple[float, float | None]] = []
    for spec in problem.tensors:
        largest = spec.nbytes if spec.max_remote is None else spec.max_remote
        bounds.append((spec.min_remote / spec.nbytes, largest / spec.nbytes))
    bounds += [(0, None)] * len(problem.uses)
    scale = max(float(cost.max(initial=0.0)), 1.0)
    result = linprog(
        cost / scale,
        A_ub=coo_matrix((values, (rows, columns)), shape=shape).tocsr() if entries else None,
        b_ub=limits or None,
        A_eq=equal,
        b_eq=[problem.remote_bytes / total],
        bounds=bounds,
        method="highs",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    if result.status != 0:
        raise RuntimeError(f"the linear program was not solved: {result.message}")
    return float(result.fun) * scale * unit + floors


def link_time(problem: PlanProblem, profile: HardwareProfile, steps: Mapping[str, int]) -> float:
    """Seconds of the objective that reading `steps` bytes of each tensor over the link takes."""
    link, sizes = profile.link(problem.remote), {s.name: s.nbytes for s in problem.tensors}
    return sum(
        use.calls
        * steps[use.tensor]
        / sizes[use.tensor]
        * use.touched_bytes
        / link_bandwidth(use, link)
        for use in problem.uses
    )


def page_steps(problem: PlanProblem, plan: Plan, profile: HardwareProfile) -> dict[str, int]:
    """Bytes that pages may cost each tensor: a page where the plan moves it; where the plan leaves
    it, as far as a plan by the byte would move it, a page at most."""
    by_the_byte = make_plan(
        replace(
            problem,
            tensors=tuple(replace(spec, page=None, granularity=1) for spec in problem.tensors),
        ),
        profile,
        move_tolerance=0.0,
    )
    steps = {}
    for spec in problem.tensors:
        there = spec.current_remote or 0
        moved = plan.splits[spec.name] != there
        steps[spec.name] = PAGE if moved else min(PAGE, abs(by_the_byte.splits[spec.name] - there))
        steps[spec.name] = min(steps[spec.name], spec.nbytes)
    return steps


def timed_problems(
    uses: int, profile: HardwareProfile
) -> Iterator[tuple[dict[str, Any], PlanProblem]]:
    """What planning is timed on, with what its row says of it: random sizes, of which no two are
    priced alike, also where they lie on pages and a twentieth more is to leave; equal layers."""
    for ratio in RATIOS:
        for ring in (0, LEAST_RING_BYTES, RING_BYTES):
            row = {"problem": "random sizes", "remote": "cpu", "ring_bytes": ring, "ratio": ratio}
            problem = model_problem(uses, ratio, ring_bytes=ring)
            yield row, problem
        asked = int(1.05 * problem.remote_bytes)
        live = moved_problem(problem, make_plan(problem, profile), seed=0)
        yield {**row, "problem": "random sizes, placed"}, replace(live, remote_bytes=asked)
        for remote in ("cpu", "peer"):
            for ring in (LEAST_RING_BYTES, RING_BYTES):
                row = {"problem": "decoder", "remote": remote, "ring_bytes": ring, "ratio": ratio}
                yield row, decoder_problem(uses, ratio, remote, ring)


def measure_time(uses: int, repeats: int) -> dict[str, Any]:
    """Planning time in milliseconds by problem, best and median of `repeats`."""
    profile = load("h200")
    rows = []
    for row, problem in timed_problems(uses, profile):
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            plan = make_plan(problem, profile)
            times.append((time.perf_counter() - start) * 1e3)
        best, median = min(times), statistics.median(times)
        rows.append({"uses": len(plan.ops), **row, "best_ms": best, "median_ms": median})
    return {"repeats": repeats, "rows": rows, "worst_best_ms": max(r["best_ms"] for r in rows)}


def measure_gaps(instances: int) -> dict[str, Any]:
    """Relative distances to the optimum; after moves, pages of link time per moved tensor."""
    before, after, pages, gaps, moved = [], [], [], [], 0
    for seed in range(instances):
        problem, profile = random_problem(seed)
        problem = on_the_grid(problem)
        plan = make_plan(problem, profile)
        optimum = linear_program(problem, profile)
        if optimum == 0:
            continue
        before.append(abs(plan.objective_bound / optimum - 1))
        after.append(plan.objective / optimum - 1)
        live = moved_problem(problem, plan, seed)
        again = make_plan(live, profile, move_tolerance=0.0)
        moved += sum(remote != plan.splits[name] for name, remote in again.splits.items())
        excess = again.objective - again.objective_bound
        allowed = link_time(live, profile, page_steps(live, again, profile))
        if excess > 1e-9 * again.objective_bound:
            pages.append(excess / allowed if allowed else math.inf)
        gaps.append(again.gap)
    return {
        "instances": instances,
        "compared": len(before),
        "before_rounding_worst": max(before),
        "after_rounding_worst": max(after),
        "after_rounding_median": statistics.median(after),
        "after_rounding_above_0.1_percent": sum(gap > 1e-3 for gap in after),
        "moved_tensors": moved,
        "moves_worst_pages_per_moved_tensor": max(pages, default=0.0),
        "moves_above_one_page": sum(share > 1 for share in pages),
        "moves_gap_median": statistics.median(gaps),
        "moves_gap_worst": max(gaps),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--uses", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    planning = measure_time(options.uses, options.repeats)
    gaps = measure_gaps(options.instances)
    bars = {
        "planning_below_50_ms": planning["worst_best_ms"] < 50,
        "optimum_before_rounding": gaps["before_rounding_worst"] < 1e-6,
        "within_0.1_percent_after_rounding": gaps["after_rounding_worst"] <= 1e-3,
        "within_a_page_per_moved_tensor": gaps["moves_worst_pages_per_moved_tensor"] <= 1,
    }
    record = {
        "benchmark": "planner",
        "command": " ".join([Path(sys.argv[0]).name, *without_folder(sys.argv[1:])]),
        "parent_commit": parent_commit(project_root()),
        "sources_sha256": sources_sha256(project_root()),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "planning": planning,
        "gaps": gaps,
        "bars": bars,
    }
    text = json.dumps(record, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    return 0 if all(bars.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
