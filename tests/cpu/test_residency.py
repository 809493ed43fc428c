"""The records that kernels read, what a dak:: op expands to, and the tiles it runs in."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from dak_inductor.cuda_runtime.tiers import open_tier
from dak_inductor.lowering import ops  # noqa: F401  (registers the operators)
from dak_inductor.lowering.residency import ALL_LOCAL, WORDS
from dak_inductor.lowering.triton_linear import expansion
from dak_inductor.lowering.triton_linear.configuration import (
    DEFAULT_WINDOW,
    REMOTE_ROWS,
    DeviceLimits,
    choose_configuration,
    configurations,
)

dak = torch.ops.dak

GPUS = {
    "H200": DeviceLimits(132, 232448, 233472, hopper=True),
    "A100": DeviceLimits(108, 166912, 167936, hopper=False),
    "RTX 4090": DeviceLimits(128, 101376, 102400, hopper=False),
}
gpus = pytest.mark.parametrize("name", GPUS)


def test_a_record_names_the_split_and_the_start_of_its_buffer() -> None:
    tier = open_tier("simulated", device=torch.device("cpu"))
    buffer = tier.allocate(64 * 128 * 4, split=64 * 64 * 4)
    weight = buffer.tensor(torch.float32, (128, 64))
    record = dak.residency.default(weight[32:])
    assert record.tolist() == [buffer.split, 0, 0, 0, 0, buffer.address, 0, 0]
    assert record.shape == (WORDS,)


def test_a_weight_in_no_buffer_is_all_local() -> None:
    assert dak.residency.default(torch.empty(8, 8))[0].item() == ALL_LOCAL


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_the_product_off_the_gpu_and_its_shape(layout: str) -> None:
    x, weight = torch.randn(5, 16), torch.randn(24, 16)
    operand = weight if layout == "out_in" else weight.t().contiguous()
    record = dak.residency.default(operand)
    torch.library.opcheck(dak.tiered_mm.default, (x, operand, record, layout))
    for rows in (x, torch.randn(2, 5, 16)):
        result = dak.tiered_mm.default(rows, operand, record, layout)
        torch.testing.assert_close(result, rows @ weight.t())


def test_expansions_compute_what_the_operators_do() -> None:
    x, weight, other = torch.randn(2, 5, 16), torch.randn(24, 16), torch.randn(24, 16)
    bias, residual = torch.randn(24), torch.randn(2, 5, 24)
    rows, columns = x.reshape(10, 16), weight.t().contiguous()
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("linear", (x, weight)),
        ("linear", (x, columns.t(), bias)),
        ("linear", (x[0, 0], weight, bias)),
        ("addmm", (bias, rows, columns)),
        ("addmm", (bias, rows, weight.t())),
        ("matmul", (x, columns)),
        ("linear_epilogue", (x, weight, bias, residual, "gelu_tanh", "out_in")),
        ("linear_epilogue", (x, columns, None, None, "silu", "in_out")),
        ("gated_linear", (x, weight, other, bias, None, "gelu", "out_in")),
        ("gated_linear", (x, columns, other.t().contiguous(), None, bias, "silu", "in_out")),
    ]
    for name, arguments in calls:
        expected = getattr(dak, name).default(*arguments)
        torch.testing.assert_close(expansion.expand(name, *arguments), expected)


@gpus
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("out_in", [True, False])
def test_configurations_fit_and_grow_with_the_rows(name: str, itemsize: int, out_in: bool) -> None:
    limits = GPUS[name]
    found = configurations(itemsize, limits, out_in=out_in)
    assert [each.m for each in found] == [16, 32, 64, 128]
    for each in found:
        needed = each.shared_bytes(itemsize, hopper=limits.hopper)
        assert needed <= limits.shared_bytes_per_block
        # the first reader alone does not overrun the window
        assert each.bytes_in_flight(itemsize) <= DEFAULT_WINDOW
    for rows, m in ((1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (4096, 128)):
        chosen = choose_configuration(rows=rows, itemsize=itemsize, limits=limits, out_in=out_in)
        assert chosen.m == m


@gpus
def test_programs_fill_the_gpu_once(name: str) -> None:
    limits = GPUS[name]
    decode = choose_configuration(rows=1, itemsize=2, limits=limits, out_in=True)
    most = limits.programs(decode, 2, out_in=True)
    assert most in (limits.processors, 2 * limits.processors)
    assert most // limits.processors * decode.shared_bytes(2, hopper=limits.hopper) <= (
        limits.shared_bytes_per_processor
    )
    # every program of an in_out weight reads remote rows, half of them at a time
    programs = limits.programs(decode, 2, out_in=False)
    assert programs * REMOTE_ROWS * decode.n * 2 // 2 <= DEFAULT_WINDOW


def test_what_operators_expand_to_is_known_after_a_compile_of_inductors_own() -> None:
    """Inductor copies its table of decompositions once, at the first compile of the process."""
    code = """
import torch
from torch._inductor.decomposition import select_decomp_table
before = select_decomp_table()
from dak_inductor.lowering import inductor
assert torch.ops.dak.linear.default not in before
inductor.register()
assert torch.ops.dak.linear.default in select_decomp_table()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
