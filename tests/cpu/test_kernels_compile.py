"""Every kernel compiles for Hopper without a GPU, to the instructions it is written for."""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from dak_inductor.cuda_runtime import streaming
from dak_inductor.cuda_runtime.nvrtc import KERNELS, Compiler, assemble

ARCHITECTURE = "sm_90a"


def tool(name):
    """A binary utility from the pip packages of the test extra, or from a toolkit."""
    folder = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    found = [str(path) for path in sorted(folder.glob(f"*/bin/{name}"))]
    path = found[0] if found else shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is missing: install the package nvidia-cuda-{name}")
    return path


@pytest.fixture(scope="module")
def compile_kernel():
    return Compiler(folder=None).cubin


@pytest.fixture(scope="module")
def disassemble(compile_kernel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cubins")
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    # cuobjdump calls nvdisasm by name
    path = os.pathsep.join([str(Path(nvdisasm).parent), os.environ.get("PATH", "")])

    def run(kernel, *options):
        cubin = compile_kernel(kernel)
        file = folder / f"{cubin.key}.cubin"
        file.write_bytes(cubin.image)
        return subprocess.run(
            [cuobjdump, *options, str(file)],
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    return run


def opcodes(sass):
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass)


def usage(text, field):
    return int(re.search(rf"\b{field}:(\d+)", text).group(1))


def kernel_id(kernel):
    return kernel.name + "".join(f"-{name}-{value}" for name, value in kernel.configuration)


every_kernel = pytest.mark.parametrize("kernel", streaming.KERNELS, ids=kernel_id)


def test_no_kernel_is_forgotten():
    assert {path.stem for path in KERNELS.glob("*.cu")} == {k.name for k in streaming.KERNELS}


@every_kernel
def test_compiles_to_a_cubin(compile_kernel, kernel):
    cubin = compile_kernel(kernel, architecture=ARCHITECTURE)
    assert cubin.image.startswith(b"\x7fELF")
    # one name everywhere: file, function, cache entry
    assert kernel.name in cubin.symbol and cubin.symbol.encode() in cubin.image
    assert "warning" not in cubin.log


@every_kernel
def test_registers_and_no_spills(disassemble, kernel):
    found = disassemble(kernel, "-res-usage")
    assert usage(found, "REG") <= 64
    assert usage(found, "LOCAL") == 0
    assert usage(found, "STACK") == 0
    used = opcodes(disassemble(kernel, "-sass"))
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
def test_uses_the_instruction_it_is_for(disassemble, kernel, instruction):
    used = opcodes(disassemble(kernel, "-sass"))
    assert any(code.startswith(instruction) for code in used), sorted(set(used))


def test_only_the_checksum_reads_what_arrived(disassemble):
    def shared_loads(kernel):
        return [c for c in opcodes(disassemble(kernel, "-sass")) if c.startswith("LDS")]

    assert shared_loads(streaming.STREAM_CHECKSUM)
    assert not shared_loads(streaming.STREAM_READ)


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.cu*")), ids=lambda p: p.name)
def test_device_code_includes_no_host_or_toolkit_header(path):
    text = path.read_text()
    assert not re.search(r"#\s*include\s*<", text)
    if path.suffix == ".cuh":
        assert "#pragma once" in text


def test_device_headers_are_all_used():
    used = {name for k in streaming.KERNELS for name, _ in assemble(k.name).headers}
    assert used == {path.relative_to(KERNELS).as_posix() for path in KERNELS.rglob("*.cuh")}
