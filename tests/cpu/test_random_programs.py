"""Random programs through the backend against eager: values, updates, memory order, bytes by tier.

Values are held to the rule of twice the error that eager makes in the same dtype against float64.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from dak_inductor.backend import compile_graph, dak
from dak_inductor.lowering import counters
from dak_inductor.options import BackendOptions
from dak_inductor.session import SESSION, CompiledGraph

from .profiles import examples
from .random_programs import TENSORS, Pool, Program, inputs, programs, tier

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
seeds = st.integers(0, 10**6)
tokens = st.sampled_from((1, 3, 5))


def shares(seed: int) -> list[float]:
    """For each tensor all local, all remote, or divided anywhere."""
    rng = random.Random(seed)
    return [rng.choice((0.0, 1.0, rng.random())) for _ in range(TENSORS)]


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


def assert_close(result: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Shape, dtype, memory order, and at most twice the error of eager."""
    assert (result.shape, result.dtype) == (eager.shape, eager.dtype)
    assert result.stride() == eager.stride()
    assert torch.equal(result.isnan(), eager.isnan())
    if torch.equal(result, eager):
        return
    error = (result.double() - exact).abs().max()
    allowed = 2 * (eager.double() - exact).abs().max()
    assert error <= allowed + 2 * torch.finfo(eager.dtype).eps * exact.abs().max()


def check(
    program: Program, dtype: torch.dtype, seed: int, count: int, dynamic: bool | None, backend: Any
) -> None:
    """Two calls, with all splits moved between them."""
    torch._dynamo.reset()
    SESSION.reset()
    pool = Pool(dtype, seed)
    eager, exact = copy.deepcopy(pool), copy.deepcopy(pool).double()
    buffers = tier(pool, shares(seed))
    compiled = torch.compile(program.__call__, backend=backend, dynamic=dynamic)
    for call in range(2):
        given_inputs = inputs(count, dtype, seed + call)
        mine, theirs, ideal = (given_inputs.clone() for _ in range(3))
        ideal = ideal.double()
        with torch.no_grad():
            wanted = program(eager, *theirs)
            best = program(exact, *ideal)
            result = compiled(pool, *mine)
        for group in zip(
            [*result, mine.x, *pool.state_dict().values()],
            [*wanted, theirs.x, *eager.state_dict().values()],
            [*best, ideal.x, *exact.state_dict().values()],
            strict=True,
        ):
            assert_close(*group)
        for buffer, share in zip(buffers.values(), shares(seed + 1), strict=True):
            buffer.move(int(share * buffer.nbytes))


# a residual in another memory order than the product
@example(Program((("left", 0, 0, 0), ("epilogue", 1, 0, 1)), 1), torch.float32, 0, 3, None)
@given(programs(), st.sampled_from(DTYPES), seeds, tokens, st.sampled_from((None, True)))
@examples(30)
def test_any_program_gives_eagers_values_and_leaves_eagers_memory(
    program: Program, dtype: torch.dtype, seed: int, count: int, dynamic: bool | None
) -> None:
    check(program, dtype, seed, count, dynamic, recording([]))


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
    check(Program(steps, 2), torch.float32, seed, 3, None, dak)
