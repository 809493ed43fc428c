"""Random programs through the backend against eager: values, updates, memory order, bytes by tier.

What is compared: `program_check`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given

from dak_inductor.backend import compile_graph, dak
from dak_inductor.compiled_graph import CompiledGraph
from dak_inductor.lowering import counters
from dak_inductor.options import BackendOptions

from .profiles import examples
from .program_check import any_program, check, seeds, tokens
from .random_programs import TENSORS, Pool, Program, inputs, programs, tier


def recording(compiled: list[CompiledGraph]) -> Callable[..., Any]:
    """The pipeline around a plain interpreter; the graphs that it makes go to `compiled`."""

    def backend(graph_module: Any, example_inputs: Any) -> Callable[..., Any]:
        made = compile_graph(
            graph_module, example_inputs, BackendOptions(), lambda graph, _: graph.forward
        )
        assert isinstance(made, CompiledGraph)
        compiled.append(made)
        return made

    return backend


# a residual in another memory order than the product
@example(Program((("left", 0, 0, 0), ("epilogue", 1, 0, 1)), 1), torch.float32, 0, (3, 3), None)
@any_program
@examples(30)
def test_any_program_gives_eagers_values_and_leaves_eagers_memory(
    program: Program, dtype: torch.dtype, seed: int, counts: tuple[int, int], dynamic: bool | None
) -> None:
    check(program, dtype, seed, counts, dynamic, recording([]))


@given(programs(), seeds, tokens)
@examples(15)
def test_what_lies_remote_is_read_from_there(program: Program, seed: int, count: int) -> None:
    """Every operator of ours over memory that is all remote counts remote bytes, and no local."""
    torch._dynamo.reset()
    pool = Pool(torch.float32, seed)
    buffers = tier(pool, [0.0] * TENSORS)
    made: list[CompiledGraph] = []
    compiled = torch.compile(program.__call__, backend=recording(made))
    counters.reset()
    with torch.no_grad():
        compiled(pool, *inputs(count, torch.float32, seed))
    read = counters.snapshot()
    assert all(each.bytes.local == 0 < each.bytes.remote for each in read)
    counted = {(each.kind, each.tensor) for each in read}
    for graph in made:
        kinds = {op.kind for op in graph.table.ops if op.rewrite and op.operand in _held(graph)}
        assert kinds <= {kind for kind, _ in counted}
    assert {name for _, name in counted} <= set(buffers)


def _held(graph: CompiledGraph) -> set[int]:
    return set(graph.table.parameters)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.slow
def test_some_programs_through_inductor(seed: int) -> None:
    rng = random.Random(seed)
    names = ("linear", "mlp", "halves", "epilogue", "cached", "lookup", "addmm", "left")
    steps = tuple((rng.choice(names), rng.randrange(5), rng.randrange(5), rng.randrange(60))
                  for _ in range(5))  # fmt: skip
    check(Program(steps, 2), torch.float32, seed, (3, 5), None, dak)
