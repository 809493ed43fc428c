"""Linear kernels on tiered weights against fp32: every size, split, layout and epilogue.

Operands are fresh and random, outputs poisoned; errors are at most twice those of torch's own
operators in the same dtype (`harness/accuracy.py`).
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import dak_inductor.lowering.ops  # noqa: F401 - registers the operators
from dak_inductor.benchmarks.harness.kernel_reads import ReadCounter
from dak_inductor.benchmarks.harness.linear_case import (
    SPLITS,
    CallSpec,
    Gating,
    LinearCase,
    make_case,
    run_operator,
    split_bytes,
)
from dak_inductor.benchmarks.harness.linear_reference import (
    ACTIVATIONS,
    LinearCall,
    make_reference,
    poison_free_memory,
)
from dak_inductor.cuda_runtime.tier import Tier

TOKENS = (
    1, 2, 3, 7, 8, 16, 17, 31, 32, 33, 64, 65, 127, 128, 129, 200, 256, 300, 512, 1000, 1024, 2048,
    4096, 4097,
)  # fmt: skip
FEW_TOKENS = (1, 16, 33, 128, 300, 1024, 4097)
LARGEST_CLUSTER_TOKENS = 4096
SIZES = ((1000, 4104), (264, 72), (8, 8), (6144, 4096))
DTYPES = (torch.bfloat16, torch.float16)
LAYOUTS = ("out_in", "in_out")
pytestmark = pytest.mark.usefixtures("compiled_kernels")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def share(rows: int, row_bytes: int, fraction: float) -> int:
    """Local bytes of a weight of which `fraction` is remote, wherever that falls."""
    return rows * row_bytes - int(rows * row_bytes * fraction)


def problem_of(
    m: int, n: int, k: int, dtype: torch.dtype, layout: str, split: int, **more: object
) -> CallSpec:
    operator = "linear" if layout == "out_in" else "matmul"
    options = {"operator": operator, "layout": layout, "splits": (split,), **more}
    return CallSpec(m, n, k, dtype, **options)  # type: ignore[arg-type]


def with_tokens(case: LinearCase, x: torch.Tensor) -> tuple[LinearCall, LinearCall]:
    """The tiered and the resident call of a case on another input."""

    def on(call: LinearCall) -> LinearCall:
        return LinearCall(x, call.weights, call.biases, call.residual, call.activation, call.layout)

    return on(case.tiered), on(case.resident)


def assert_right(operator: str, tiered: LinearCall, resident: LinearCall, what: object) -> None:
    """Run into poisoned memory; both errors within twice torch's own."""
    reference = make_reference(resident)
    if tiered.x.is_cuda:
        nbytes = reference.exact.numel() * tiered.x.element_size()
        poison_free_memory(nbytes, tiered.x.device)
    output = run_operator(operator, tiered)  # type: ignore[arg-type]
    assert output.shape == reference.exact.shape and output.dtype == tiered.x.dtype, what
    assert bool(output.isfinite().all()), f"{what}: elements were not written"
    verdict = reference.judge(output)
    assert verdict.passed, f"{what}: {verdict}"


def test_poison_reaches_the_next_output(device: torch.device) -> None:
    for rows, columns in ((1, 8), (16, 1000), (1000, 6144)):
        poison_free_memory(rows * columns * 2, device)
        found = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
        assert bool(found.isnan().all())


@layouts
@dtypes
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_every_token_count(
    host_tier: Tier, device: torch.device, n: int, k: int, dtype: torch.dtype, layout: str
) -> None:
    rows, columns = (n, k) if layout == "out_in" else (k, n)
    split = share(rows, columns * 2, 0.3)
    case = make_case(problem_of(1, n, k, dtype, layout, split), host_tier, device)
    for m in TOKENS:
        x = torch.randn(m, k, dtype=dtype, device=device)
        assert_right(case.problem.operator, *with_tokens(case, x), f"M={m}")


@layouts
@pytest.mark.parametrize("name", SPLITS)
def test_every_split(tier: Tier, device: torch.device, name: str, layout: str) -> None:
    for n, k in ((1000, 4104), (2056, 4096), (264, 72)):
        rows, columns = (n, k) if layout == "out_in" else (k, n)
        split = split_bytes(name, rows, columns * 2)
        case = make_case(problem_of(1, n, k, torch.bfloat16, layout, split), tier, device)
        counter = ReadCounter(case.buffers)
        counter.reset()
        for m in FEW_TOKENS:
            x = torch.randn(m, k, dtype=torch.bfloat16, device=device)
            assert_right(case.problem.operator, *with_tokens(case, x), f"N={n}, K={k}, M={m}")
        torch.cuda.synchronize()
        reads = counter.read()
        expected = sum(m <= LARGEST_CLUSTER_TOKENS for m in FEW_TOKENS)
        assert reads is not None and reads.calls >= expected, f"not the kernel's: {reads}"


@dtypes
@layouts
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_epilogue(
    host_tier: Tier, device: torch.device, activation: str, layout: str, dtype: torch.dtype
) -> None:
    n, k = 1000, 520
    rows, columns = (n, k) if layout == "out_in" else (k, n)
    for bias, residual, m in itertools.product((False, True), (False, True), FEW_TOKENS):
        problem = problem_of(
            m, n, k, dtype, layout, split_bytes("in a row", rows, columns * 2),
            operator="linear_epilogue", activation=activation, bias=bias, residual=residual,
        )  # fmt: skip
        verdict = make_case(problem, host_tier, device).check()
        assert verdict.passed, f"{problem}: {verdict}"


@dtypes
@layouts
@pytest.mark.parametrize("gating", ["separate", "fused"])
def test_gated(
    host_tier: Tier, device: torch.device, gating: Gating, layout: str, dtype: torch.dtype
) -> None:
    n, k = 776, 1032
    whole = n * k * 2
    splits = [(whole // 2 + 528, whole // 3), (0, whole), (whole, 0), (256, whole - 256)]
    if gating == "fused":
        splits = [(whole + 528,), (0,), (2 * whole,), (whole // 4,), (2 * whole - 512,)]
    for activation, bias in (("silu", False), ("gelu", True), ("gelu_tanh", False)):
        for chosen, m in itertools.product(splits, (1, 17, 128, 300, 2048)):
            problem = problem_of(
                m, n, k, dtype, layout, 0, operator="gated_linear", gating=gating,
                activation=activation, bias=bias, splits=chosen,
            )  # fmt: skip
            verdict = make_case(problem, host_tier, device).check()
            assert verdict.passed, f"{problem}: {verdict}"


@layouts
@pytest.mark.parametrize("operator", ["linear", "addmm", "matmul"])
def test_every_operator_and_bias(
    host_tier: Tier, device: torch.device, operator: str, layout: str
) -> None:
    if operator == "linear" and layout == "in_out":
        layout = "out_in"  # a linear has one layout: once more, with other numbers
    n, k = 1000, 4104
    for m in FEW_TOKENS:
        problem = problem_of(
            m, n, k, torch.bfloat16, layout, share(n, k * 2, 0.4), operator=operator,
            bias=operator != "matmul",
        )  # fmt: skip
        verdict = make_case(problem, host_tier, device).check()
        assert verdict.passed, f"{problem}: {verdict}"


def test_weight_is_a_row_slice_of_a_larger_buffer(tier: Tier, device: torch.device) -> None:
    n, k = 3072, 4096
    case = make_case(
        problem_of(1, n, k, torch.bfloat16, "out_in", share(n, k * 2, 0.5)), tier, device
    )
    (tiered,), (resident,) = case.tiered.weights, case.resident.weights
    counter = ReadCounter(case.buffers)
    for first, last in ((0, 1000), (1000, 3072), (1400, 1680), (2000, 3072), (8, 1536)):
        held = case.buffers[0].bytes_in(first * k * 2, last * k * 2)
        for m in (1, 33, 300):
            x = torch.randn(m, k, dtype=torch.bfloat16, device=device)
            counter.reset()
            assert_right(
                "linear",
                LinearCall(x, (tiered[first:last],), (None,)),
                LinearCall(x, (resident[first:last],), (None,)),
                f"rows {first} to {last}, M={m}",
            )
            torch.cuda.synchronize()
            reads = counter.read()
            assert reads is not None and reads.calls == 1
            assert held.remote <= reads.remote_bytes <= 1.05 * held.remote


def test_inputs_of_any_rank_and_stride(host_tier: Tier, device: torch.device) -> None:
    n, k = 1000, 520
    case = make_case(
        problem_of(1, n, k, torch.bfloat16, "out_in", share(n, k * 2, 0.3)), host_tier, device
    )

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device)

    inputs = {
        "one vector": random(k),
        "batch and time": random(3, 5, k),
        "four dimensions": random(2, 1, 3, k),
        "every other row": random(20, k)[::2],
        "every other column": random(20, 2 * k)[:, ::2],
        "columns of a wider tensor": random(20, 3 * k)[:, k : 2 * k],
        "an odd column first": random(20, k + 3)[:, 1 : k + 1],
        "transposed": random(k, 20).t(),
        "transposed batch": random(5, 3, k).transpose(0, 1),
        "expanded": random(1, k).expand(20, k),
        "empty batch": random(0, k),
        "empty inner batch": random(3, 0, k),
    }
    for what, x in inputs.items():
        if x.numel() == 0:
            output = run_operator("linear", with_tokens(case, x)[0])
            assert output.shape == (*x.shape[:-1], n), what
            continue
        assert_right("linear", *with_tokens(case, x), what)


def test_residuals_of_any_stride(host_tier: Tier, device: torch.device) -> None:
    m, n, k = 17, 264, 520
    problem = problem_of(
        m, n, k, torch.bfloat16, "out_in", share(n, k * 2, 0.3),
        operator="linear_epilogue", residual=True,
    )  # fmt: skip
    case = make_case(problem, host_tier, device)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device)

    for what, residual in {
        "columns of a wider tensor": random(m, 3 * n)[:, n : 2 * n],
        "an odd column first": random(m, n + 4)[:, 1 : n + 1],
        "rows of odd length": random(m, n + 1)[:, :n],
        "transposed": random(n, m).t(),
        "one row for all": random(1, n).expand(m, n),
        "one column for all": random(m, 1).expand(m, n),
    }.items():
        tiered, resident = (
            replace(call, residual=residual) for call in (case.tiered, case.resident)
        )
        assert_right("linear_epilogue", tiered, resident, what)


def test_what_the_kernel_refuses_is_the_stock_result(host_tier: Tier, device: torch.device) -> None:
    def stock_equals(x: torch.Tensor, weight: torch.Tensor, what: str) -> None:
        found = torch.ops.dak.linear.default(x, weight, None)
        assert torch.equal(found, torch.nn.functional.linear(x, weight)), what

    for n, k, dtype in (
        (264, 76, torch.bfloat16),  # K % 8
        (1001, 512, torch.bfloat16),  # N % 8
        (264, 72, torch.float32),
        (264, 72, torch.float64),
    ):
        case = make_case(
            problem_of(5, n, k, dtype, "out_in", share(n, k * dtype.itemsize, 0.5)),
            host_tier, device,
        )  # fmt: skip
        stock_equals(case.tiered.x, case.tiered.weights[0], f"N={n}, K={k}, {dtype}")
    buffer = host_tier.allocate(1 << 20, split=1 << 19)
    buffer.write(torch.randn(1 << 19).to(torch.bfloat16))
    x = torch.randn(5, 512, dtype=torch.bfloat16, device=device)
    for offset_bytes, stride in ((2, (512, 1)), (8, (512, 1)), (0, (516, 1)), (0, (1024, 2))):
        view = buffer.tensor(torch.bfloat16, (256, 512), stride, offset_bytes)
        stock_equals(x, view, f"offset {offset_bytes}, strides {stride}")
    with pytest.raises(RuntimeError):
        torch.ops.dak.linear.default(x.half(), view, None)
    resident = torch.randn(264, 512, dtype=torch.bfloat16, device=device)
    stock_equals(x, resident, "a weight that is not tiered")
