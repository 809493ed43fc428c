"""Problems for the planner: a large model, random ones, and the same once their tensors lie."""

from __future__ import annotations

import random
from dataclasses import replace

from dak_inductor.hardware import HardwareProfile, load, shipped
from dak_inductor.plan import OpUse, Plan, PlanProblem, TensorSpec

PAGE = 2 << 20


def model_problem(uses: int, ratio: float) -> PlanProblem:
    """Linear weights of random sizes (1 to 256 MiB), each read by a prefill and a decode graph."""
    rng = random.Random(uses)
    tensors, reads = [], []
    for index in range(uses // 2):
        nbytes = rng.randrange(1 << 20, 1 << 28)
        name = f"model.layers.{index // 7}.linear{index % 7}.weight"
        tensors.append(TensorSpec(name, nbytes))
        for graph, rows, calls in (("prefill", 8192, 1.0), ("decode", 8, 32.0)):
            other = rows * 16384.0
            reads.append(
                OpUse(
                    f"linear_{index}", graph, name, "linear", nbytes, other, nbytes * rows, calls,
                    module=f"model.layers.{index // 7}", m=rows,
                )
            )  # fmt: skip
    total = sum(spec.nbytes for spec in tensors)
    return PlanProblem(tuple(tensors), tuple(reads), int(ratio * total), "cpu")


def random_problem(seed: int) -> tuple[PlanProblem, HardwareProfile]:
    """Linears, embeddings and caches of one to three graphs, some held on one side, any ratio."""
    rng = random.Random(seed)
    profile = load(rng.choice(shipped()))
    profile = replace(profile, hbm_bandwidth=profile.hbm_bandwidth * rng.uniform(0.3, 2))
    graphs = [
        (f"graph{i}", rng.choice((1, 8, 64, 512, 4096, 16384)), rng.choice((1, 4, 32, 1000)))
        for i in range(rng.randint(1, 3))
    ]
    tensors, reads = [], []
    for index in range(rng.randint(1, 40)):
        nbytes = int(2 ** rng.uniform(20, 30)) // 2 * 2
        name = f"tensor{index}"
        pinned = rng.random()
        tensors.append(
            TensorSpec(
                name,
                nbytes,
                min_remote=nbytes // 2 if pinned < 0.05 else 0,
                max_remote=0 if pinned > 0.95 else nbytes // 3 if pinned > 0.9 else None,
            )
        )
        sparse = rng.random() < 0.2
        for graph, rows, calls in graphs:
            if rng.random() < 0.2:
                continue
            touched = min(nbytes, rows * 8192) if sparse else nbytes
            other, flops = rows * rng.choice((0, 8192, 65536)), 0 if sparse else nbytes * rows
            reads.append(
                OpUse(f"op{index}", graph, name, "linear", touched, other, flops, calls, m=rows)
            )
    possible = sum(s.nbytes if s.max_remote is None else s.max_remote // 256 * 256 for s in tensors)
    asked = int(possible * rng.random() ** 2)
    asked = max(asked, sum(spec.min_remote for spec in tensors))
    remote = rng.choice(sorted(profile.links))
    problem = PlanProblem(tuple(tensors), tuple(reads), min(asked, possible), remote)
    return problem, profile


def on_the_grid(problem: PlanProblem) -> PlanProblem:
    """The same problem with `min_remote` and `max_remote` at sizes that a split can give."""

    def aligned(spec: TensorSpec) -> TensorSpec:
        tail = spec.nbytes % spec.granularity
        fewest = spec.min_remote and spec.min_remote + (tail - spec.min_remote) % spec.granularity
        most = spec.max_remote
        if most is not None:
            most = max(0, most - (most - tail) % spec.granularity)
        return replace(spec, min_remote=fewest, max_remote=most)

    tensors = tuple(map(aligned, problem.tensors))
    fewest = sum(spec.min_remote for spec in tensors)
    most = sum(s.nbytes if s.max_remote is None else s.max_remote for s in tensors)
    asked = min(max(problem.remote_bytes, fewest), most)
    return replace(problem, tensors=tensors, remote_bytes=asked)


def moved_problem(problem: PlanProblem, plan: Plan, seed: int) -> PlanProblem:
    """The problem once its tensors live as planned, for another number of remote bytes."""
    rng = random.Random(seed)
    tensors = tuple(
        replace(
            spec,
            min_remote=0,
            max_remote=None,
            current_remote=plan.splits[spec.name],
            page=PAGE,
            first_page_split=(spec.nbytes - plan.splits[spec.name]) % PAGE,
        )
        for spec in problem.tensors
    )
    asked = int(sum(spec.nbytes for spec in tensors) * rng.random())
    return replace(problem, tensors=tensors, remote_bytes=asked)
