"""Generated kernels that start early, between ours, read what is written and nothing older.

Replays follow each other at once, each with inputs of its own: a kernel that does not wait finds
what the replay before it left, or what is half written.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.utils import run_and_get_code

import dak_inductor as dak
from dak_inductor.benchmarks.harness.accuracy import poison
from dak_inductor.lowering.early_start import ENTRY, unavailable
from dak_inductor.offloaded import record_of
from dak_inductor.placement import LAUNCH_LOCK
from dak_inductor.session import SESSION

WIDTH, TOKENS, DEPTH, REPLAYS = 4096, 8, 4, 200
SHAPES = ((TOKENS, WIDTH), (TOKENS, 1), (3, WIDTH))
WAIT = "tl.extra.cuda.gdc_wait()"


class Chain(nn.Module):
    """Products with normalisations between them, residuals over two products, and a fill."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()

        def layers() -> nn.ModuleList:
            made = (nn.Linear(WIDTH, WIDTH, False, device, torch.bfloat16) for _ in range(DEPTH))
            return nn.ModuleList(made)

        self.up, self.down = layers(), layers()

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        filled = x.new_full((3, WIDTH), 0.5)
        total = torch.zeros(TOKENS, 1, device=x.device)
        for up, down in zip(self.up, self.down, strict=True):
            kept = F.rms_norm(x, (WIDTH,))
            inner = F.rms_norm(torch.sin(up(kept)) + kept, (WIDTH,))
            x = F.rms_norm(down(inner), (WIDTH,)) / 2 + torch.tanh(kept) * scale
            total = total + x.float().sum(-1, keepdim=True) / WIDTH**0.5
        return x, total, filled


@pytest.fixture(autouse=True)
def _needs_early_start() -> Iterator[None]:
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    SESSION.reset()
    torch._dynamo.reset()
    yield
    SESSION.reset()


def drawn(device: torch.device, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs for `count` replays."""
    generator = torch.Generator(device).manual_seed(7)
    x = torch.randn(count, TOKENS, WIDTH, device=device, generator=generator)
    scale = torch.randn(count, 1, WIDTH, device=device, generator=generator)
    return x.bfloat16(), scale.bfloat16()


def offloaded(model: Chain, ratio: float, remote: str, **options: object) -> nn.Module:
    """A copy of the model, compiled; the code is generated here and not taken from a cache."""
    held = dak.offload(copy.deepcopy(model), offload_ratio=ratio, remote=remote, progress=False)
    given = {"trials": False, "force_disable_caches": True, **options}
    held.compile(backend="dak", options=given)
    return held


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("strategy", ["direct", "staged"])
def test_replays_are_right_whatever_ran_before(
    device: torch.device, remote: str, ratio: float, strategy: str
) -> None:
    model = Chain(device)
    xs, scales = drawn(device, REPLAYS)
    chain = offloaded(model, ratio or 0.02, remote, strategy=strategy)
    x, scale = xs[0].clone(), scales[0].clone()
    _, sources = run_and_get_code(chain, x, scale)
    code = "\n".join(sources)
    assert code.count("'launch_pdl': True") >= 3 and code.count(WAIT) >= 3
    assert "torch.ops.dak." in code, "no product of ours is between the generated kernels"
    if not ratio:
        everything_local(chain)
    for _ in range(3):
        chain(x, scale)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = chain(x, scale)
    got = [torch.empty(REPLAYS, *shape, device=device) for shape in SHAPES]
    for index in range(REPLAYS):
        x.copy_(xs[index])
        scale.copy_(scales[index])
        for output in outputs:
            poison(output)
        graph.replay()
        for kept, output in zip(got, outputs, strict=True):
            kept[index].copy_(output)
    check(model, xs, scales, got)


@torch.no_grad()
def test_calls_without_a_graph_are_right(device: torch.device, remote: str) -> None:
    model = Chain(device)
    xs, scales = drawn(device, 50)
    chain = offloaded(model, 0.3, remote)
    got = [torch.empty(50, *shape, device=device) for shape in SHAPES]
    for index in range(50):
        for kept, output in zip(got, chain(xs[index], scales[index]), strict=True):
            kept[index].copy_(output)
    check(model, xs, scales, got)


@torch.no_grad()
def test_it_can_be_switched_off(device: torch.device, host_tier: object) -> None:
    xs, scales = drawn(device, 1)
    chain = offloaded(Chain(device), 0.3, "cpu", **{ENTRY: False})
    _, sources = run_and_get_code(chain, xs[0], scales[0])
    code = "\n".join(sources)
    assert "gdc_" not in code and "'launch_pdl': True" not in code


class Turning(nn.Module):
    """A product whose weight the same graph turns around first, by a kernel ahead of others."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH, False, device, torch.bfloat16)

    def forward(self, x: torch.Tensor, turns: bool) -> torch.Tensor:
        if turns:
            self.up.weight.neg_()
        return F.rms_norm(self.up(F.rms_norm(x, (WIDTH,))), (WIDTH,))


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["direct", "staged"])
def test_weights_are_read_as_a_graph_ahead_has_written_them(
    device: torch.device, remote: str, strategy: str
) -> None:
    model = Turning(device)
    x = torch.randn(TOKENS, WIDTH, device=device).bfloat16()
    expected = model(x, False)
    held = offloaded(model, 0.3, remote, strategy=strategy)
    sign, found = 1, []
    for index in range(60):  # one graph turns and reads, the other reads behind it
        turns = index % 3 == 0
        sign = -sign if turns else sign
        found.append((sign, held(x, turns)))
    for index, (turned, output) in enumerate(found):
        assert (output - turned * expected).abs().max() < 0.2, f"call {index}"


def everything_local(chain: nn.Module) -> None:
    """As a plan may leave it: the kernels are those of divided weights, and wait for no link."""
    record = record_of(chain)
    assert record is not None
    SESSION.automatic_moves = False
    with LAUNCH_LOCK:
        torch.cuda.synchronize()
        for weight in record.weights.values():
            weight.buffer.move(weight.buffer.nbytes)


def check(model: Chain, xs: torch.Tensor, scales: torch.Tensor, got: list[torch.Tensor]) -> None:
    """Against eager. Roundings make 0.2 at most, a value of another replay 1 on average."""
    for index, (x, scale) in enumerate(zip(xs, scales, strict=True)):
        for kept, expected in zip(got, model(x, scale), strict=True):
            error = (kept[index] - expected.float()).abs()
            assert error.max() < 0.6 and error.mean() < 0.03, f"replay {index}: {error.max()}"
