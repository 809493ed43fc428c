"""Random programs, and random plans of one model, on a card.

Programs are those of the CPU tests, through the kernels, with tensors too small for more than one
page: of the plans of a larger model splits, strategies and windows are drawn. With
HYPOTHESIS_PROFILE=long there are many times as many of both.
"""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("hypothesis", reason="needs hypothesis: pip install 'hypothesis>=6'")

from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dak_inductor.backend import compile_graph
from dak_inductor.cuda_runtime.tiers import open_tier
from dak_inductor.cuda_runtime.window import window_of
from dak_inductor.offloaded import record_of
from dak_inductor.options import BackendOptions
from dak_inductor.placement import LAUNCH_LOCK

from ..cpu.profiles import SCALE, examples
from ..cpu.program_check import any_program, check, seeds
from ..cpu.random_programs import Program
from .ahead_blocks import offloaded, run, strategies

pytestmark = pytest.mark.usefixtures("no_grad", "compiled_kernels")

PLANS = 6
KIB = 1024


@pytest.mark.timeout(3600 if SCALE > 1 else 240)
@any_program
@examples(25)
def test_any_program_gives_eagers_values_and_leaves_eagers_memory(
    program: Program, dtype: torch.dtype, seed: int, counts: tuple[int, int], dynamic: bool | None
) -> None:
    def backend(graph: object, example: object) -> object:
        return compile_graph(graph, example, BackendOptions(), lambda module, _: module.forward)

    device = torch.device("cuda", torch.cuda.current_device())
    own = open_tier("cpu", device=device)
    check(program, dtype, seed, counts, dynamic, backend, own, device)


@pytest.mark.timeout(3600 if SCALE > 1 else 240)
@strategies
def test_any_plan_of_one_model(device: torch.device, remote: str, strategy: str) -> None:
    """Any split under any window: within the rule, and the same bits each time. Of steps that copy
    all remote rows ahead the bits are those of any other window too: no kernel reads through it.
    Direct kernels cut the work along K by the window, and so add up in another order."""
    model, judge = offloaded(device, strategy, remote)
    record = record_of(model)
    assert record is not None
    window = window_of(device, remote)
    usual = window.nbytes

    @given(seeds, st.sampled_from((1, 16, 130, 640)))
    @examples(PLANS)
    def any_plan(seed: int, count: int) -> None:
        chosen = random.Random(seed)
        with LAUNCH_LOCK:
            torch.cuda.synchronize()
            for weight in record.weights.values():
                share = chosen.choice((0.0, 1.0, chosen.random()))
                weight.buffer.move(round(share * weight.buffer.nbytes))
        x = judge.inputs(count)
        for _ in range(2):
            model(x)  # copies ahead are decided anew after a move
        found: dict[int, Tensor] = {}
        for nbytes in (usual, 1, chosen.randrange(64 * KIB, 4096 * KIB)):
            torch.cuda.synchronize()
            window.set(nbytes)
            found[nbytes] = run(model, x)
            what = f"{strategy}, {count} tokens, seed {seed}, window {nbytes}"
            judge.check(found[nbytes], x, what)
            assert torch.equal(run(model, x), found[nbytes]), what
        if strategy == "staged":
            assert all(torch.equal(each, found[usual]) for each in found.values()), seed

    try:
        any_plan()
    finally:
        torch.cuda.synchronize()
        window.set(usual)
