"""What Inductor generates on CUDA for the dak:: operators, and that Triton compiles it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

CASES = ("linear", "gated, dynamic", "in_out, tails", "float32", "linear_epilogue", "gated_linear")
PRODUCTS = {"gated, dynamic": 2, "gated_linear": 2}
EPILOGUES = {
    "linear": "libdevice.exp",
    "gated, dynamic": "libdevice.exp",
    "in_out, tails": "libdevice.tanh",
    "linear_epilogue": "libdevice.erf",
    "gated_linear": "libdevice.exp",
}


@dataclass(frozen=True, slots=True)
class Kernel:
    """One Triton kernel in the generated code."""

    name: str
    source: str
    signature: dict[str, str]
    warps: int
    stages: int


def kernels_in(code: str) -> list[Kernel]:
    """The kernels, without the decorator that would look for a GPU to launch them on."""
    found = []
    for name, text in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.S):
        start, end = text.index("@triton_heuristics"), text.index("@triton.jit")
        decorator = text[start:end]
        signature = re.search(r"'signature': (\{.*?\})", decorator)
        warps, stages = (re.search(rf"num_{what}=(\d+)", decorator) for what in ("warps", "stages"))
        assert signature and warps and stages, "every kernel of these graphs is a template"
        found.append(
            Kernel(
                name,
                text[:start] + text[end:],
                ast.literal_eval(signature[1]),
                int(warps[1]),
                int(stages[1]),
            )
        )
    return found


def main_of(kernel: Kernel) -> str:
    """The kernel itself, without the device functions that follow it."""
    return kernel.source.partition("@triton.jit")[2].partition("@triton.jit")[0]


@pytest.mark.parametrize("case", CASES)
def test_the_graph_is_its_products_and_nothing_else(generated: dict[str, str], case: str) -> None:
    code = generated[case]
    kernels = kernels_in(code)
    assert len(kernels) == PRODUCTS.get(case, 1)
    assert "extern_kernels" not in code.partition("def call(")[2]
    assert code.count("torch.ops.dak.residency.default(") == len(kernels)
    assert code.count(".run(") == len(kernels)
    if case in EPILOGUES:
        assert EPILOGUES[case] in main_of(kernels[-1])


def test_no_record_is_handed_to_another_buffer(generated: dict[str, str]) -> None:
    """Inductor takes it for a buffer of its own, free after its last use."""
    assert "# reuse" not in generated["eight integers"]


def test_a_dynamic_number_of_rows_is_an_argument(generated: dict[str, str]) -> None:
    for case in ("gated, dynamic", "linear_epilogue"):
        for kernel in kernels_in(generated[case]):
            assert "M = ks0" in main_of(kernel)


def test_an_op_for_the_cuda_template_stays_one_call(generated: dict[str, str]) -> None:
    code = generated["for the CUDA template"].partition("def call(")[2]
    assert code.count("torch.ops.dak.linear_epilogue.default(") == 1
    assert ".run(" not in code.partition("runner =")[0]
    assert "extern_kernels" not in code and "dak.residency" not in code


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_without_spills(
    generated: dict[str, str],
    load_kernel: Callable[[str, str], Any],
    compile_kernel: Callable[..., Any],
    case: str,
    architecture: int,
) -> None:
    for kernel in kernels_in(generated[case]):
        built = compile_kernel(
            load_kernel(kernel.source, kernel.name),
            kernel.signature,
            architecture=architecture,
            warps=kernel.warps,
            stages=kernel.stages,
        )
        assert built.stack_bytes == 0
        assert "cp.async" in built.ptx, "the loads are not pipelined"
        if case != "float32":
            assert re.search("wgmma.mma_async|mma.sync", built.ptx)
