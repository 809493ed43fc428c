"""Faults that only a card can have: a capture that breaks, and a card that others use."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from dak_inductor.benchmarks.harness.timing import capture
from dak_inductor.options import Strategy

from .ahead_blocks import move_all, offloaded, run, strategies

pytestmark = pytest.mark.usefixtures("no_grad")


class StopCaptureError(Exception):
    pass


@strategies
@pytest.mark.parametrize("tokens", [1, 640])
def test_an_exception_inside_a_captured_region(
    device: torch.device, strategy: Strategy, tokens: int
) -> None:
    """The caller gets his own error; eager calls, moves and a new capture work as before."""
    model, expected = offloaded(device, strategy)
    x = expected.inputs(tokens)
    for _ in range(3):
        model(x)
    torch.cuda.synchronize()
    for attempt in range(3):
        with pytest.raises(StopCaptureError), torch.cuda.graph(torch.cuda.CUDAGraph()):
            model(x)
            raise StopCaptureError
        expected.check(run(model, x), x, f"eager after broken capture {attempt}")
    move_all(model, 0.8)
    expected.check(run(model, x), x, "after a move")
    step = capture(lambda: model(x))
    for _ in range(3):
        x.copy_(expected.inputs(tokens))
        output = step()
        torch.cuda.synchronize()
        assert isinstance(output, torch.Tensor)
        expected.check(output, x, "a new capture")


SHARING = """
import copy, sys, torch
from torch import nn
import dak_inductor as dak
from dak_inductor.offloaded import record_of

torch.manual_seed(int(sys.argv[1]))
model = nn.Sequential(*(nn.Linear(2048, 2048, dtype=torch.bfloat16) for _ in range(4)))
own = copy.deepcopy(model).cuda()
exact = copy.deepcopy(model).cuda().float()
dak.offload(model, offload_ratio=0.5)
run = torch.compile(model, backend="dak")
with torch.no_grad():
    for number in range(200):
        x = torch.randn(1 + number % 3 * 16, 2048, dtype=torch.bfloat16, device="cuda")
        best = exact(x.float())
        error, allowed = ((y.float() - best).abs().max() for y in (run(x), own(x)))
        assert error <= 2 * allowed, (number, error, allowed)
        if number % 20 == 10:
            torch.cuda.synchronize()
            for weight in record_of(model).weights.values():
                weight.buffer.move(number % 40 * weight.buffer.nbytes // 30)
read = dak.stats().total.remote
dak.restore(model)
print("right", read > 0)
"""


@pytest.mark.alone
def test_two_processes_share_one_card(device: torch.device) -> None:
    """Each has its own tiers, windows and words of launches; both answer right."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SHARING), str(seed)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for seed in (1, 2)
    ]  # fmt: skip
    for child in children:
        out, err = child.communicate(timeout=200)
        assert child.returncode == 0 and out.split("\n")[-2] == "right True", (
            out[-500:] + err[-2000:]
        )


FIRST_STOCK = """
import torch
from torch import nn
import dak_inductor as dak
from dak_inductor.benchmarks.harness.timing import capture

torch.manual_seed(0)
layers = [nn.Linear(4096, 4096, bias=False, dtype=torch.bfloat16) for _ in range(6)]
exact = [layer.weight.detach().float() for layer in layers]
model = nn.Sequential(*layers)
dak.offload(model, offload_ratio=0.3)
run = torch.compile(model, backend="dak", options={"strategy": "staged", "trials": False})
x = torch.randn(16, 4096, dtype=torch.bfloat16, device="cuda")
with torch.no_grad():
    for _ in range(4):
        run(x)
    output = capture(lambda: run(x))()
wanted, allowed = x.cpu().float(), x.cpu()
for weight in exact:
    wanted, allowed = wanted @ weight.t(), allowed @ weight.bfloat16().t()
error, bound = ((y.cpu().float() - wanted).abs().max() for y in (output, allowed))
print("right", bool(error <= 2 * bound), dak.stats().total.remote > 0)
"""


def test_a_capture_may_be_the_first_to_need_stock_products(device: torch.device) -> None:
    """Calls outside of it were all the kernel's, so that this process has no handle of cuBLAS."""
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FIRST_STOCK)],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert child.stdout.split("\n")[-2:-1] == ["right True True"], (
        child.stdout[-500:] + child.stderr[-2000:]
    )
