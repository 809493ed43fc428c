"""A random program through a backend beside eager: values, updates and memory order.

Values are held to the rule of twice the error that eager makes in the same dtype against float64.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.session import SESSION

from .random_programs import TENSORS, Pool, Program, inputs, programs, tier

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
seeds = st.integers(0, 10**6)
tokens = st.sampled_from((1, 3, 5))
any_program = given(
    programs(),
    st.sampled_from(DTYPES),
    seeds,
    st.tuples(tokens, tokens),
    st.sampled_from((None, True)),
)
"""Program, dtype, seed, token counts of two calls, and the `dynamic` of `torch.compile`."""


def shares(seed: int) -> list[float]:
    """For each tensor all local, all remote, or divided anywhere."""
    rng = random.Random(seed)
    return [rng.choice((0.0, 1.0, rng.random())) for _ in range(TENSORS)]


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
    program: Program,
    dtype: torch.dtype,
    seed: int,
    counts: tuple[int, int],
    dynamic: bool | None,
    backend: Any,
    own: Tier | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Two calls with these numbers of tokens, all splits moved between them, on a tier (of its own
    by default)."""
    torch._dynamo.reset()
    SESSION.reset()
    pool = Pool(dtype, seed).to(device)
    eager, exact = copy.deepcopy(pool), copy.deepcopy(pool).double()
    buffers = tier(pool, shares(seed), own)
    compiled = torch.compile(program.__call__, backend=backend, dynamic=dynamic)
    for call, count in enumerate(counts):
        given_inputs = inputs(count, dtype, seed + call).to(device)
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
