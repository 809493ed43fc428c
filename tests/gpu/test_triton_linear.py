"""The portable kernel on tiered weights, through torch.compile(backend="dak"), against fp32.

The registry is told to choose no other template: on this card the CUDA one would serve the calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dak_inductor.benchmarks.harness.accuracy import errors, judge, poison
from dak_inductor.benchmarks.harness.kernel_reads import ReadCounter
from dak_inductor.benchmarks.harness.linear_reference import poison_free_memory
from dak_inductor.benchmarks.harness.timing import capture
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.lowering import registry

TOKENS = (1, 2, 16, 17, 64, 200, 513)
SIZES = ((1000, 4104), (264, 72), (1001, 777), (6144, 4096))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
REMOTE = (0.0, 0.013, 0.5, 1.0)

layouts = pytest.mark.parametrize("layout", ["out_in", "in_out"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _only_triton() -> Iterator[None]:
    pytest.importorskip("triton", reason="triton is not installed")
    registry.forget()
    with registry.only("triton"), torch.no_grad():
        yield


def weight_in(
    tier: Tier,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    *,
    remote: float = 0.5,
) -> tuple[TieredBuffer, torch.Tensor]:
    """A random weight of which the given fraction of bytes is remote."""
    values = torch.randn(shape, dtype=torch.float32) / shape[1] ** 0.5
    values = values.to(dtype)
    buffer = tier.allocate(values.nbytes, split=values.nbytes - int(values.nbytes * remote))
    buffer.write(values)
    return buffer, buffer.tensor(dtype, shape)


def product(layout: str) -> Callable[..., torch.Tensor]:
    if layout == "out_in":
        return lambda x, weight: F.linear(x, weight)
    return lambda x, weight: x @ weight


def compiled(function: Callable[..., torch.Tensor], **options: Any) -> Callable[..., torch.Tensor]:
    return torch.compile(function, backend="dak", **options)


def check(
    function: Callable[..., torch.Tensor],
    ours: Callable[..., torch.Tensor],
    *operands: torch.Tensor,
) -> None:
    """Error of `ours` against `function` in fp32: at most twice that of `function` itself."""
    ours(*operands)  # compile, before free memory is poisoned
    whole = operands[0].dtype == torch.float32
    reference = function(
        *(operand.to(torch.float64 if whole else torch.float32) for operand in operands)
    )
    own = function(*(operand.clone() for operand in operands))
    poison_free_memory(own.nbytes, own.device)
    verdict = judge(errors(ours(*operands), reference), errors(own, reference))
    # In fp32 only the order of summation tells the two apart; torch sums in several chains.
    slack = 1e-5 * reference.abs().max().item() if whole else 0.0
    assert verdict.passed or verdict.ours.max_abs <= slack, verdict


def served_by_triton() -> bool:
    chosen = registry.choices()
    return bool(chosen) and all(choice.template == "triton" for _, _, choice in chosen)


@dtypes
@layouts
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_against_fp32(
    host_tier: Tier, device: torch.device, size: tuple[int, int], layout: str, dtype: torch.dtype
) -> None:
    n, k = size
    function = product(layout)
    for remote in REMOTE:
        _, weight = weight_in(
            host_tier, size if layout == "out_in" else (k, n), dtype, remote=remote
        )
        torch._dynamo.reset()
        ours = compiled(function, dynamic=False)
        for m in (1, 17, 200):
            check(function, ours, torch.randn(m, k, dtype=dtype, device=device), weight)
    assert served_by_triton()


@layouts
def test_one_dynamic_graph_for_all_sizes(tier: Tier, device: torch.device, layout: str) -> None:
    function = product(layout)
    ours = compiled(function, dynamic=True)
    _, weight = weight_in(tier, (2056, 2056), remote=0.3)
    torch._dynamo.mark_static(weight)  # as a parameter's shape is
    for m in TOKENS[1:]:
        x = torch.randn(m, 2056, dtype=torch.bfloat16, device=device)
        check(function, ours, x, weight)
    assert served_by_triton()


@pytest.mark.parametrize("remote_share", [0.0, 0.4, 1.0])
def test_epilogues_and_slices_of_one_weight(
    host_tier: Tier, device: torch.device, remote_share: float
) -> None:
    def mlp(
        x: torch.Tensor, fused: torch.Tensor, down: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        gate, up = fused.chunk(2)
        hidden = F.silu(F.linear(x, gate)) * F.linear(x, up)
        return F.gelu(F.linear(hidden, down, bias), approximate="tanh") + x

    _, fused = weight_in(host_tier, (2 * 1536, 1024), remote=remote_share)
    _, down = weight_in(host_tier, (1024, 1536), remote=remote_share)
    bias = torch.randn(1024, dtype=torch.bfloat16, device=device)
    for m in (1, 16, 130):
        x = torch.randn(2, m, 1024, dtype=torch.bfloat16, device=device)
        check(mlp, compiled(mlp, dynamic=False), x, fused, down, bias)
    assert served_by_triton()


def kernels_of(step: Callable[[], object]) -> list[str]:
    """Names of the kernels that one call launches."""
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
    ]


def test_the_epilogue_is_in_the_kernel(host_tier: Tier, device: torch.device) -> None:
    def function(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor:
        return F.silu(F.linear(x, weight, bias)) + residual

    _, weight = weight_in(host_tier, (4096, 2048), remote=0.1)
    bias = torch.randn(4096, dtype=torch.bfloat16, device=device)
    x = torch.randn(16, 2048, dtype=torch.bfloat16, device=device)
    residual = torch.randn(16, 4096, dtype=torch.bfloat16, device=device)
    ours = compiled(function, dynamic=False)
    check(function, ours, x, weight, bias, residual)
    assert len(kernels_of(lambda: ours(x, weight, bias, residual))) == 1


@layouts
def test_splits_move_between_replays_of_one_graph(
    tier: Tier, device: torch.device, layout: str
) -> None:
    n, k = 8192, 2048
    function = product(layout)
    buffer, weight = weight_in(tier, (n, k) if layout == "out_in" else (k, n), remote=0.5)
    x = torch.randn(16, k, dtype=torch.bfloat16, device=device)
    ours = compiled(function, dynamic=False)
    check(function, ours, x, weight)
    step = capture(lambda: ours(x, weight))
    reference = function(x.float(), weight.float())
    own = errors(function(x, weight.clone()), reference)
    counter = ReadCounter([buffer])
    for fraction in (0.0, 1.0, 0.25, 0.9):
        torch.cuda.synchronize()
        buffer.move(int(buffer.nbytes * fraction))
        counter.reset()
        poison(step.output)
        step()
        torch.cuda.synchronize()
        assert judge(errors(step.output, reference), own).passed
        reads = counter.read()
        row_bytes = weight.stride(0) * weight.element_size()
        local = buffer.split // row_bytes * row_bytes
        assert reads is not None and reads.calls == 1
        assert (reads.local_bytes, reads.remote_bytes) == (local, buffer.nbytes - local)


def test_reduce_overhead(host_tier: Tier, device: torch.device) -> None:
    """Inductor's own CUDA graphs: the op that finds the record runs at capture only."""
    buffer, weight = weight_in(host_tier, (4096, 4096), remote=0.5)
    resident = torch.randn(4096, 4096, dtype=torch.bfloat16, device=device) / 64
    x = torch.randn(8, 4096, dtype=torch.bfloat16, device=device)

    def function(x: torch.Tensor, weight: torch.Tensor, resident: torch.Tensor) -> torch.Tensor:
        return F.linear(F.relu(F.linear(x, weight)), resident)

    ours = compiled(function, dynamic=False, options={"triton.cudagraphs": True})
    for split in (buffer.split, 0, buffer.nbytes, buffer.nbytes // 3):
        torch.cuda.synchronize()
        buffer.move(split)
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            check(function, lambda *operands: ours(*operands).clone(), x, weight, resident)
