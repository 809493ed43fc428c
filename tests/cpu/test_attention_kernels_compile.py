"""Every instance of the attention kernel compiles for Hopper to the instructions it is written for.

No GPU is needed: TMA copies, wgmma with queries and with powers as the first operand, and registers
that do not spill.
"""

from __future__ import annotations

import collections
from dataclasses import replace

import pytest

from dak_inductor.cuda_runtime.nvrtc import KernelInstance
from dak_inductor.lowering.attention.configuration import SHARED_BYTES, configurations
from dak_inductor.lowering.attention.instances import all_instances

from .kernel_names import MOST_REGISTERS, barrier_names, name_of, options

INSTANCES = all_instances()


def test_each_instance_is_there_once_and_fits() -> None:
    assert len(set(INSTANCES)) == len(INSTANCES) > 0
    assert {options(kernel)["half"] for kernel in INSTANCES} == {False, True}
    assert {options(kernel)["teams"] for kernel in INSTANCES} == {1, 2}
    assert not any(options(kernel)["bounded_waits"] for kernel in INSTANCES)
    for configuration in configurations():
        assert configuration.slots >= 3
        assert configuration.shared_bytes <= SHARED_BYTES


@pytest.mark.parametrize("kernel", INSTANCES, ids=name_of)
def test_compiles_to_its_instructions(kernel: KernelInstance, disassembler) -> None:  # type: ignore[no-untyped-def]
    cubin = disassembler.cubin(kernel)
    assert kernel.name in cubin.symbol and cubin.symbol.encode() in cubin.image
    assert "warning" not in cubin.log, cubin.log
    used = collections.Counter(disassembler.opcodes(kernel))
    head_dim = int(options(kernel)["head_dim"])
    copies = {code for code in used if code.startswith("UTMALDG")}
    assert copies == {"UTMALDG.4D"}
    panels = head_dim // 64 + (head_dim % 64 > 0)
    assert used["UTMALDG.4D"] == panels, "one copy for each panel, of keys and values alike"
    assert any(code.startswith("UTMAPF") for code in used), "first tiles are asked for ahead"
    products = {code: count for code, count in used.items() if code.startswith("HGMMA")}
    assert any(".BF16" in code for code in products) != bool(options(kernel)["half"]), products
    tile = int(options(kernel)["tile"])
    assert sum(products.values()) == head_dim // 16 + tile // 16 * panels, products
    assert not [code for code in used if code.startswith(("LDL", "STL"))], "registers spill"
    # a division by a call takes too long for a thread that issues copies
    assert not [code for code in used if code.startswith("CALL")]
    found = disassembler.usage(kernel)
    assert found["LOCAL"] == 0 and found["STACK"] == 0, found
    assert found["REG"] <= MOST_REGISTERS, found


def test_debug_builds_name_their_barriers(disassembler) -> None:  # type: ignore[no-untyped-def]
    """A wait that never ends is a trap with the barrier's name, in debug builds alone."""
    kernel = INSTANCES[0]
    expected = barrier_names(kernel)
    assert len(expected) == 4
    debug = {**options(kernel), "bounded_waits": True}
    bounded = disassembler.cubin(replace(kernel, configuration=tuple(debug.items()))).image
    assert {name for name in expected if name in bounded} == expected
    assert not [name for name in expected if name in disassembler.cubin(kernel).image]
