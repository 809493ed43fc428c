"""Kernels that start early wait before their first access, whatever Inductor generates."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

WAIT = "tl.extra.cuda.gdc_wait()"
LAUNCH = "tl.extra.cuda.gdc_launch_dependents()"
BRANCH = re.compile(r"    (?:if|elif) (?:pid|num_xblocks)\b")
CASES = (
    "pointwise",
    "dynamic",
    "persistent reduction",
    "looped reduction",
    "split reduction",
    "welford",
    "scan",
    "split scan",
    "sort",
    "transpose",
    "block pointers",
    "descriptors",
    "fill",
    "in place",
    "atomic",
    "gather",
    "bucketize",
    "random",
    "combo",
    "foreach",
    "residual over a product",
    "fill before a product",
    "behind a product",
)
COMPILED = (
    "pointwise",
    "persistent reduction",
    "looped reduction",
    "fill",
    "in place",
    "atomic",
    "random",
    "foreach",
)
HEURISTICS = {
    "persistent reduction": "persistent_reduction",
    "looped reduction": "reduction",
    "cooperative reduction": "cooperative_reduction",
    "split scan": "split_scan",
    "foreach": "foreach",
}
CONSTANTS = {"XBLOCK": 64, "YBLOCK": 16, "R0_BLOCK": 1024, "load_seed_offset": 1}


@dataclass(frozen=True, slots=True)
class Kernel:
    """One Triton kernel in the generated code, `source` without its decorator."""

    name: str
    decorator: str
    source: str

    @property
    def early(self) -> bool:
        """Launched with the attribute."""
        return "'launch_pdl': True" in self.decorator

    @property
    def parts(self) -> list[list[str]]:
        """The statements of its body; each branch of a kernel made of several is one."""
        _, _, text = self.source.partition(f"def {self.name}(")
        lines = text.splitlines()[1:]
        starts = [index for index, line in enumerate(lines) if BRANCH.match(line)]
        if not starts:
            return [[line.strip() for line in lines]]
        ends = [*starts[1:], next(i for i, line in enumerate(lines) if line == "    else:")]
        return [
            [line.strip() for line in lines[start + 1 : end]]
            for start, end in zip(starts, ends, strict=True)
        ]

    def signature(self) -> dict[str, str]:
        found = re.search(r"'signature': (\{.*?\})", self.decorator)
        assert found
        kinds: dict[str, str] = ast.literal_eval(found[1])
        return kinds


def kernels_in(code: str) -> list[Kernel]:
    found = []
    for name, text in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.S):
        start = text.index("@triton_heuristics")
        end = text.index("@triton.jit", start)
        found.append(Kernel(name, text[start:end], text[:start] + text[end:]))
    assert found
    return found


def waits_first(statements: list[str]) -> bool:
    """Nothing ahead of the wait so much as names a pointer."""
    if WAIT not in statements:
        return False
    ahead = statements[: statements.index(WAIT)]
    return not any(re.search(r"_ptr|\btl\.(load|store|atomic)", each) for each in ahead)


def checked(kernel: Kernel) -> None:
    for statements in kernel.parts:
        assert statements.count(WAIT) == 1 and waits_first(statements), "\n".join(statements)
        assert statements.count(LAUNCH) == 1
        assert statements.index(LAUNCH) == statements.index(WAIT) - 1


@pytest.mark.parametrize("case", CASES)
def test_every_kernel_waits_before_it_touches_memory(generated_early, case):
    for kernel in kernels_in(generated_early["ours"][case]):
        assert kernel.early
        checked(kernel)


def test_kernels_are_of_the_kinds_that_cases_are_for(generated_early):
    ours = generated_early["ours"]
    for case, heuristic in HEURISTICS.items():
        assert f"@triton_heuristics.{heuristic}(" in ours[case], case
    assert "tl.make_block_ptr(" in ours["block pointers"]
    assert "make_tensor_descriptor(" in ours["descriptors"]
    assert "tl.atomic_add(" in ours["atomic"]
    assert "bucketize_binary_search(" in ours["bucketize"]
    assert "load_seed_offset" in ours["random"]
    (foreach,) = kernels_in(ours["foreach"])
    assert len(foreach.parts) == 2
    (fill,) = kernels_in(ours["fill"])
    assert "tl.load(" not in fill.source
    for case in ("residual over a product", "fill before a product", "behind a product"):
        assert "torch.ops.dak.linear_epilogue.default(" in ours[case]


def test_inductor_alone_leaves_waits_out(generated_early):
    """What the patch is for. A fill waits for nobody, so our product behind it, which waits for
    the fill alone, would read what a kernel further ahead may still write."""
    stock = generated_early["inductor"]
    without = [k for k in kernels_in(stock["fill before a product"]) if WAIT not in k.source]
    (fill,) = without
    assert fill.early and "tl.load(" not in fill.source
    late = [k for k in kernels_in(stock["atomic"]) if not waits_first(k.parts[0])]
    assert late and all(kernel.early for kernel in late)


def test_cooperative_reductions_wait_and_are_launched_without_the_attribute(generated_early):
    (kernel,) = kernels_in(generated_early["ours"]["cooperative reduction"])
    assert not kernel.early
    checked(kernel)
    (stock,) = kernels_in(generated_early["inductor"]["cooperative reduction"])
    assert stock.early


@pytest.mark.parametrize("way", ["ours", "inductor"])
def test_templates_have_neither_instruction_nor_attribute(generated_early, way):
    (kernel,) = kernels_in(generated_early[way]["template"])
    assert "launch_pdl" not in kernel.decorator and "gdc_" not in kernel.source


def test_nothing_is_left_where_it_is_off(generated_early):
    for code in generated_early["off"].values():
        assert "gdc_" not in code and "'launch_pdl': True" not in code


def test_inductor_generates_the_same_before_and_after_the_patch(generated_early):
    def plain(code: str) -> str:
        return re.sub(r"# kernel path: .*", "", code)

    for case, code in generated_early["inductor again"].items():
        assert plain(code) == plain(generated_early["inductor"][case])


@pytest.mark.parametrize(
    "compile_of",
    ["by default", "by default again", "switched on", "on by configuration"],
)
def test_graphs_of_the_backend_start_early(generated_early, compile_of):
    for kernel in kernels_in(generated_early["backend"][compile_of]):
        assert kernel.early
        (statements,) = kernel.parts
        assert statements[1:3] == [LAUNCH, WAIT], "not the first lines of the body, which are ours"


@pytest.mark.parametrize(
    "compile_of",
    ["switched off", "off by configuration", "plain afterwards", "plain in another thread"],
)
def test_other_graphs_do_not(generated_early, compile_of):
    code = generated_early["backend"][compile_of]
    assert "gdc_" not in code and "'launch_pdl': True" not in code


def test_a_plain_graph_keeps_inductors_own_waits(generated_early):
    (kernel,) = kernels_in(generated_early["backend"]["plain, on by configuration"])
    (statements,) = kernel.parts
    assert kernel.early and statements.index(WAIT) > 2


@pytest.mark.parametrize("case", COMPILED)
def test_launch_and_wait_stay_first_in_what_triton_compiles(
    generated_early: dict[str, dict[str, str]],
    load_kernel: Callable[[str, str], Any],
    compile_kernel: Callable[..., Any],
    case: str,
) -> None:
    for kernel in kernels_in(generated_early["ours"][case]):
        signature = kernel.signature()
        constants = {
            name: CONSTANTS[name] for name, kind in signature.items() if kind == "constexpr"
        }
        source = kernel.source.replace("triton_helpers.set_driver_to_gpu()", "")
        built = compile_kernel(
            load_kernel(source, kernel.name),
            signature,
            architecture=90,
            warps=4,
            stages=1,
            constants=constants,
        )
        accesses = re.search(r"\b(?:ld|st|red|atom)\.(?:\w+\.)*global|cp\.async", built.ptx)
        assert accesses, built.ptx
        first_wait = built.ptx.index("griddepcontrol.wait")
        assert built.ptx.index("griddepcontrol.launch_dependents") < first_wait < accesses.start()
