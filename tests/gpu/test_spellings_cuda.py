"""Products with a weight in rare spellings, through the kernels: right, and each byte read once."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dak_inductor as dak
from dak_inductor.benchmarks.harness.accuracy import errors, judge
from dak_inductor.offloaded import record_of

pytestmark = pytest.mark.usefixtures("no_grad", "compiled_kernels")

DEPTH, HEADS, SIZE = 2048, 16, 128
FEATURES = HEADS * SIZE
SPELLINGS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]]
SPELLINGS = {
    "heads": (
        lambda x, w: torch.einsum("bsd,dhk->bhsk", x, w), (2, 5, DEPTH), (DEPTH, HEADS, SIZE)
    ),
    "heads back": (
        lambda x, w: torch.einsum("bshk,hkd->bsd", x, w), (2, 5, HEADS, SIZE), (HEADS, SIZE, DEPTH)
    ),
    "tensordot": (lambda x, w: torch.tensordot(x, w, dims=1), (2, 5, DEPTH), (DEPTH, FEATURES)),
    "inner": (torch.inner, (7, DEPTH), (FEATURES, DEPTH)),
    "on the left": (lambda x, w: w @ x, (DEPTH, 4), (FEATURES, DEPTH)),
    "vector": (lambda x, w: torch.mv(w, x), (DEPTH,), (FEATURES, DEPTH)),
}  # fmt: skip


class Spelled(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]):
        super().__init__()
        self.function = function
        weight = torch.randn(shape, dtype=torch.bfloat16) / DEPTH**0.5
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_is_served_and_counted(device: torch.device, remote: str, name: str) -> None:
    function, inputs, shape = SPELLINGS[name]
    model = Spelled(function, shape)
    own = copy.deepcopy(model).to(device)
    exact = copy.deepcopy(model).to(device, torch.float32)
    dak.offload(model, offload_ratio=0.5, remote=remote)
    model.compile(backend="dak")
    for number in range(3):
        x = torch.randn(inputs, dtype=torch.bfloat16, device=device)
        dak.stats(reset=True)
        output, stock, reference = model(x), own(x), exact(x.float())
        assert output.stride() == stock.stride()
        verdict = judge(errors(output, reference), errors(stock, reference))
        assert verdict.passed, (number, verdict)
        record = record_of(model)
        assert record is not None
        assert dak.stats().total == record.bytes_by_tier()
    assert dak.stats().total.remote > 0
    assert not dak.explain(model).plan.refusals
