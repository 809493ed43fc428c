"""Every kernel compiles for Hopper without a GPU, to the instructions it is written for."""

import re

import pytest

from dak_inductor.cuda_runtime import read_count, streaming
from dak_inductor.cuda_runtime.nvrtc import KERNELS, assemble
from dak_inductor.lowering.attention.instances import all_instances as attention_instances
from dak_inductor.lowering.linear import stopwatch
from dak_inductor.lowering.linear.instances import all_instances as linear_instances


def kernel_id(kernel):
    return kernel.name + "".join(f"-{name}-{value}" for name, value in kernel.configuration)


SMALL_KERNELS = (*streaming.KERNELS, *read_count.KERNELS, *stopwatch.KERNELS)
every_kernel = pytest.mark.parametrize("kernel", SMALL_KERNELS, ids=kernel_id)


def names_of_all_kernels():
    """The small kernels are looked at here, the others in tests of their own."""
    instances = (*SMALL_KERNELS, *linear_instances(), *attention_instances())
    return {kernel.name for kernel in instances}


def test_no_kernel_is_forgotten():
    assert {path.stem for path in KERNELS.glob("*.cu")} == names_of_all_kernels()


@every_kernel
def test_compiles_to_a_cubin(disassembler, kernel):
    cubin = disassembler.cubin(kernel)
    assert cubin.image.startswith(b"\x7fELF")
    # one name everywhere: file, function, cache entry
    assert kernel.name in cubin.symbol and cubin.symbol.encode() in cubin.image
    assert "warning" not in cubin.log


@every_kernel
def test_registers_and_no_spills(disassembler, kernel):
    found = disassembler.usage(kernel)
    assert found["REG"] <= 64
    assert found["LOCAL"] == 0
    assert found["STACK"] == 0
    used = disassembler.opcodes(kernel)
    assert len(used) > 10 and "EXIT" in used
    spills = [code for code in used if code.startswith(("LDL", "STL"))]
    assert not spills
    # a 64-bit division is a subroutine, too slow for a loop that issues copies
    assert not [code for code in used if code.startswith("CALL")]


@pytest.mark.parametrize(
    ("kernel", "instruction"),
    [
        (streaming.STREAM_READ, "UBLKCP"),
        (streaming.STREAM_READ, "SYNCS.PHASECHK.TRANS64.TRYWAIT"),
        (streaming.STREAM_CHECKSUM, "UBLKCP"),
        (streaming.STREAM_WRITE, "UBLKCP"),
        (streaming.ROUND_TRIP, "LDG.E.STRONG.SYS"),
    ],
)
def test_uses_the_instruction_it_is_for(disassembler, kernel, instruction):
    used = disassembler.opcodes(kernel)
    assert any(code.startswith(instruction) for code in used), sorted(set(used))


def test_only_the_checksum_reads_what_arrived(disassembler):
    def shared_loads(kernel):
        return [c for c in disassembler.opcodes(kernel) if c.startswith("LDS")]

    assert shared_loads(streaming.STREAM_CHECKSUM)
    assert not shared_loads(streaming.STREAM_READ)


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.cu*")), ids=lambda p: p.name)
def test_device_code_includes_no_host_or_toolkit_header(path):
    text = path.read_text()
    assert not re.search(r"#\s*include\s*<", text)
    if path.suffix == ".cuh":
        assert "#pragma once" in text


def test_device_headers_are_all_used():
    used = {header for name in names_of_all_kernels() for header, _ in assemble(name).headers}
    assert used == {path.relative_to(KERNELS).as_posix() for path in KERNELS.rglob("*.cuh")}
