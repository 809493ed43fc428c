"""Problems for the planner: large models, random ones, and the same once their tensors lie."""

from __future__ import annotations

import random
from dataclasses import replace

from dak_inductor.hardware import load, shipped
from dak_inductor.hardware_profile import HardwareProfile
from dak_inductor.plan import OpUse, Plan, PlanProblem, TensorSpec

PAGE = 2 << 20
_BLOCK_ROWS = 8  # of which copies ahead are whole numbers
_ROW_BLOCK = _BLOCK_ROWS * 2 * 4096
_GRAPHS = {"prefill": (8192, 1.0), "decode": (8, 32.0)}  # rows and calls
_LLAMA = {
    "q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096),
    "gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336),
}  # fmt: skip


def model_problem(uses: int, ratio: float, *, ring_bytes: int = 0) -> PlanProblem:
    """Linear weights of random sizes (1 to 256 MiB), each read by a prefill and a decode graph.

    With a ring their rows, of 4096 elements, may be copied ahead.
    """
    rng = random.Random(uses)
    tensors, reads = [], []
    for index in range(uses // 2):
        nbytes = rng.randrange(1 << 20, 1 << 28)
        if ring_bytes:
            nbytes -= nbytes % _ROW_BLOCK
        name = f"model.layers.{index // 7}.linear{index % 7}.weight"
        tensors.append(TensorSpec(name, nbytes, row_block=_ROW_BLOCK if ring_bytes else 0))
        for graph, (rows, calls) in _GRAPHS.items():
            other = rows * 16384.0
            reads.append(
                OpUse(
                    f"linear_{index}", graph, name, "linear", nbytes, other, nbytes * rows, calls,
                    module=f"model.layers.{index // 7}", m=rows,
                )
            )  # fmt: skip
    return _problem(tensors, reads, ratio, "cpu", ring_bytes)


def decoder_problem(uses: int, ratio: float, remote: str, ring_bytes: int) -> PlanProblem:
    """Layers of Llama-3-8B, as many as have so many uses in a prefill and a decode graph."""
    tensors, reads = [], []
    for layer in range(round(uses / (len(_LLAMA) * len(_GRAPHS)))):
        for part, (out, width) in _LLAMA.items():
            name, nbytes = f"model.layers.{layer}.{part}.weight", 2 * out * width
            op = f"{'gate_up' if part in ('gate', 'up') else part}_{layer}"
            tensors.append(TensorSpec(name, nbytes, row_block=_BLOCK_ROWS * 2 * width))
            for graph, (rows, calls) in _GRAPHS.items():
                other = 2.0 * rows * (out + width)
                reads.append(
                    OpUse(
                        op, graph, name, "linear", nbytes, other, nbytes * rows, calls,
                        module=f"model.layers.{layer}", m=rows,
                    )
                )  # fmt: skip
    return _problem(tensors, reads, ratio, remote, ring_bytes)


def _problem(
    tensors: list[TensorSpec], reads: list[OpUse], ratio: float, remote: str, ring_bytes: int
) -> PlanProblem:
    asked = int(ratio * sum(spec.nbytes for spec in tensors))
    return PlanProblem(tuple(tensors), tuple(reads), asked, remote, ring_bytes=ring_bytes)


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
