"""Rows that were copied ahead: the linear kernel reads them in the ring, and nowhere else."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from dak_inductor.benchmarks.harness.accuracy import errors, judge
from dak_inductor.benchmarks.harness.kernel_reads import count_runs
from dak_inductor.cuda_runtime.tier import Tier
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.lowering.linear.configuration import configurations
from dak_inductor.lowering.linear.launch import CopiedRows, LinearLaunch, Operand
from dak_inductor.lowering.linear.problem import Activation, LinearProblem

pytestmark = pytest.mark.usefixtures("compiled_kernels")

SIZES = [(4096, 1024), (1000, 584), (264, 4104)]


def half_copied(
    tier: Tier, n: int, k: int, first: int, dtype: torch.dtype, label: str
) -> tuple[TieredBuffer, Tensor, Tensor, Tensor]:
    """A weight whose rows from `first` on are remote and hold no numbers, what it held, and those
    rows in device memory with others around them."""
    nbytes = n * k * 2
    buffer = tier.allocate(nbytes, split=first * k * 2 // 256 * 256)
    buffer.label = label
    weight = buffer.tensor(dtype, (n, k))
    values = torch.randn(n, k, device=weight.device, dtype=dtype) / 8
    weight.copy_(values)
    weight[first:] = float("nan")
    ring = torch.full(((n - first + 16) * k,), float("nan"), device=weight.device, dtype=dtype)
    rows = ring[8 * k : (8 + n - first) * k].view(n - first, k)
    rows.copy_(values[first:])
    return buffer, weight, values, rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 7, 16, 33, 128])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_copied_rows_are_read_in_the_ring_alone(
    tier: Tier, device: torch.device, n: int, k: int, gated: bool, m: int, dtype: torch.dtype
) -> None:
    x = torch.randn(m, k, device=device, dtype=dtype)
    residual = torch.randn(m, n, device=device, dtype=dtype)
    problem = LinearProblem(m, n, k, dtype, gated)
    for first in (0, 8, n // 3 // 8 * 8, n - 8):
        made = [half_copied(tier, n, k, first, dtype, "one")]
        if gated:  # the other has as many rows in the ring, or none
            made.append(half_copied(tier, n, k, n if m == 7 else first, dtype, "two"))
        operands = tuple(Operand(weight, None, buffer) for buffer, weight, _, _ in made)
        copied = [CopiedRows(n - len(rows), rows) if len(rows) else None for _, _, _, rows in made]
        of = [x.float() @ values.float().t() for _, _, values, _ in made]
        expected = torch.nn.functional.silu(of[0]) * (of[1] if gated else 1) + residual.float()
        stock = torch.nn.functional.silu(x @ made[0][2].t())
        stock = (stock * (x @ made[1][2].t()) if gated else stock) + residual
        for configuration in configurations(problem):
            if configuration.cluster > 1:
                continue
            launch = LinearLaunch(problem, configuration, operands, Activation.SILU, device)
            out = torch.full((m, n), float("nan"), device=device, dtype=dtype)
            reads = count_runs(
                partial(launch, x, residual, out, copied), [buffer for buffer, *_ in made]
            )
            verdict = judge(errors(out, expected), errors(stock, expected))
            assert verdict.passed, f"{configuration}, from row {first}: {verdict}"
            held = sum((buffer.bytes_by_tier() for buffer, *_ in made), TierBytes())
            assert (reads.local_bytes, reads.remote_bytes) == (held.local, held.remote)
            assert reads.calls == len(made) and held.remote


def test_a_replay_reads_what_lies_in_the_ring_by_then(tier: Tier, device: torch.device) -> None:
    n, k, first = 4096, 1024, 3000
    buffer, weight, values, rows = half_copied(tier, n, k, first, torch.bfloat16, "one")
    x = torch.randn(1, k, device=device, dtype=torch.bfloat16)
    out = torch.empty(1, n, device=device, dtype=torch.bfloat16)
    problem = LinearProblem(1, n, k, torch.bfloat16)
    configuration = next(c for c in configurations(problem) if c.paired)
    operand = Operand(weight, None, buffer)
    launch = LinearLaunch(problem, configuration, (operand,), Activation.NONE, device)
    source, other = rows.clone(), rows * -2

    def step() -> None:
        rows.copy_(source)
        launch(x, None, out, [CopiedRows(first, rows)])
        launch(x, None, out, [CopiedRows(first, rows)])

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for turn in range(100):
        source.copy_(values[first:] if turn % 2 else other)
        out.fill_(float("nan"))
        graph.replay()
        whole = torch.cat([values[:first], source]).float()
        torch.testing.assert_close(out.float(), x.float() @ whole.t(), rtol=2e-2, atol=2e-2)
