"""Every instance of the linear kernel compiles for Hopper to the instructions it is written for.

No GPU is needed: TMA copies, multicast within clusters, wgmma, and registers that do not spill.
"""

from __future__ import annotations

import collections
from dataclasses import replace

import pytest

from dak_inductor.cuda_runtime.nvrtc import KernelInstance
from dak_inductor.lowering.linear.instances import all_instances

from .kernel_names import MOST_REGISTERS, barrier_names, name_of, options

INSTANCES = all_instances()
every_instance = pytest.mark.parametrize("kernel", INSTANCES, ids=name_of)


def test_each_instance_is_there_once() -> None:
    assert len(set(INSTANCES)) == len(INSTANCES) > 0
    assert len({name_of(kernel) for kernel in INSTANCES}) == len(INSTANCES)
    for flag in ("cluster", "gated", "in_out", "half"):
        assert {options(kernel)[flag] for kernel in INSTANCES} == {False, True}, flag
    assert not any(options(kernel)["bounded_waits"] for kernel in INSTANCES)


@every_instance
def test_compiles_to_its_instructions(kernel: KernelInstance, disassembler) -> None:  # type: ignore[no-untyped-def]
    cubin = disassembler.cubin(kernel)
    assert kernel.name in cubin.symbol and cubin.symbol.encode() in cubin.image
    assert "warning" not in cubin.log, cubin.log
    used = collections.Counter(disassembler.opcodes(kernel))
    copies = [code for code in used if code.startswith("UTMALDG.2D")]
    assert copies, sorted(used)
    multicast = [code for code in copies if ".MULTICAST" in code]
    assert bool(multicast) == bool(options(kernel)["cluster"]), copies
    assert set(copies) - set(multicast), "the tokens of a CTA are its own"
    shape = f"HGMMA.64x{options(kernel)['tokens']}x16.F32"
    products = {code: count for code, count in used.items() if code.startswith("HGMMA")}
    assert products and all(code.startswith(shape) for code in products), products
    assert any(".BF16" in code for code in products) != bool(options(kernel)["half"]), products
    assert not [code for code in used if code.startswith(("LDL", "STL"))], "registers spill"
    found = disassembler.usage(kernel)
    assert found["LOCAL"] == 0 and found["STACK"] == 0, found
    assert found["REG"] <= MOST_REGISTERS, found


def test_debug_builds_name_their_barriers(disassembler) -> None:  # type: ignore[no-untyped-def]
    """A wait that never ends is a trap with the barrier's name, in debug builds alone."""
    expected = barrier_names(INSTANCES[0])
    assert len(expected) > 1
    bounded, usual = b"", b""
    for cluster in (False, True):
        kernel = next(kernel for kernel in INSTANCES if options(kernel)["cluster"] == cluster)
        debug = {**options(kernel), "bounded_waits": True}
        bounded += disassembler.cubin(replace(kernel, configuration=tuple(debug.items()))).image
        usual += disassembler.cubin(kernel).image
    assert {name for name in expected if name in bounded} == expected
    assert not [name for name in expected if name in usual]
