"""Launches as the driver receives them, against a driver that only writes them down."""

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from dak_inductor.cuda_runtime import nvrtc

ROOT = Path(__file__).resolve().parents[2]
PREAMBLE = """
import ctypes, os, struct
import pytest
from dak_inductor.cuda_runtime.kernel import LoadedKernel
from dak_inductor.cuda_runtime.nvrtc import Cubin, extension
from dak_inductor.errors import DriverError

def load(symbol="symbol"):
    return LoadedKernel(Cubin("name", "key", symbol, "", b"image\\0"), 1)

def record():
    library = ctypes.CDLL(os.environ["DAK_LIBCUDA"])
    library.launch_record.restype = ctypes.c_char_p
    return library.launch_record().decode().splitlines()

ARGUMENTS = [bytes(range(64)), struct.pack("<III", 1, 2, 3)]
SIZE_ALONE = {"grid": (4, 2, 1), "block": (128, 1, 1)}
SIZE = {**SIZE_ALONE, "stream": 7}
"""
HEX = bytes(range(64)).hex() + " 010000000200000003000000"


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("driver") / "libcuda_of_launches.so"
    source = ROOT / "tests" / "fake_launch" / "launch_driver.cpp"
    include = nvrtc.KERNELS.parent / "src"
    command = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{include}", str(source)]
    subprocess.run([*command, "-o", str(library)], check=True)
    return library


@pytest.fixture
def run(driver):
    """Runs code in a process of its own, whose driver is the one that writes down."""

    def run(code):
        environment = {**os.environ, "DAK_LIBCUDA": str(driver)}
        done = subprocess.run(
            [sys.executable, "-c", PREAMBLE + code], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_launch_reaches_the_driver_as_asked(run):
    lines = run("""
kernel = load()
kernel.launch(**SIZE, arguments=ARGUMENTS, shared_bytes=1024)
kernel.launch(**SIZE, arguments=ARGUMENTS, shared_bytes=200_000, cluster=(2, 1, 1))
kernel.launch(**{**SIZE, "grid": (32, 1, 1)}, arguments=ARGUMENTS, cluster=(16, 1, 1))
kernel.launch(**{**SIZE, "grid": (32, 1, 1)}, arguments=ARGUMENTS, cluster=(16, 1, 1))
print("\\n".join(record()))
""")
    launch = "block=128,1,1 shared={} stream=7{} " + HEX + " depth=1"
    assert lines == [
        "load image depth=1",
        "function symbol depth=1",
        "launch grid=4,2,1 " + launch.format(1024, ""),
        "set 8=200000 depth=1",  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, once
        "launch grid=4,2,1 " + launch.format(200_000, " attribute4=2,1,1"),
        "set 14=1 depth=1",  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, once
        "launch grid=32,1,1 " + launch.format(0, " attribute4=16,1,1"),
        "launch grid=32,1,1 " + launch.format(0, " attribute4=16,1,1"),
    ]


def test_a_prepared_launch_brings_the_bytes_that_change(run):
    lines = run("""
kernel = load()
patches = [(0, 2, 3), (1, 8, 4)]
prepared = kernel.prepared(
    grid=(4, 2, 1), block=(128, 1, 1), arguments=ARGUMENTS, patches=patches, shared_bytes=200_000,
    cluster=(2, 1, 1),
)
prepared.launch(7, b"abc" + struct.pack("<I", 9))
prepared.launch(8, b"xyz" + struct.pack("<I", 10))
for wrong in (b"", b"12345678"):
    with pytest.raises(ValueError, match=f"a launch brings 7 bytes, got {len(wrong)}"):
        prepared.launch(7, wrong)
for patch in ((2, 0, 1), (1, 12, 1), (1, 2**64 - 1, 1), (0, 64, 2**64 - 1)):
    with pytest.raises(ValueError, match="are not all of argument"):
        kernel.prepared(**SIZE_ALONE, arguments=ARGUMENTS, patches=[patch])
with pytest.raises(ValueError, match=r"got \\( 64 \\)"):
    kernel.prepared(**SIZE_ALONE, arguments=ARGUMENTS[:1], patches=[])
del kernel
prepared.launch(7, b"abc" + struct.pack("<I", 9))
print("\\n".join(record()))
""")
    first = bytes(range(64))

    def launched(stream: int, some: bytes, last: int) -> str:
        patched = (first[:2] + some + first[5:]).hex()
        words = struct.pack("<III", 1, 2, last).hex()
        return (
            f"launch grid=4,2,1 block=128,1,1 shared=200000 stream={stream} attribute4=2,1,1 "
            f"{patched} {words} depth=1"
        )

    assert [line for line in lines if line.startswith("launch")] == [
        launched(7, b"abc", 9), launched(8, b"xyz", 10), launched(7, b"abc", 9)
    ]  # fmt: skip
    assert "set 8=200000 depth=1" in lines


def test_wrong_launches_never_reach_the_driver(run):
    lines = run("""
kernel = load()
short = [ARGUMENTS[0], bytes(8)]
with pytest.raises(ValueError, match=r"symbol takes .*\\( 64 12 \\) bytes, got \\( 64 8 \\)"):
    kernel.launch(**SIZE, arguments=short)
with pytest.raises(ValueError, match=r"got \\( 64 \\)"):
    kernel.launch(**SIZE, arguments=ARGUMENTS[:1])
with pytest.raises(ValueError, match="axis 0 of the grid has 4 CTAs, which clusters of 3"):
    kernel.launch(**SIZE, arguments=ARGUMENTS, cluster=(3, 1, 1))
with pytest.raises(ValueError, match="axis 1 of the grid has 0 CTAs"):
    kernel.launch(**{**SIZE, "grid": (1, 0, 1)}, arguments=ARGUMENTS)
print("\\n".join(record()))
""")
    assert [line for line in lines if line.startswith("launch")] == []


def test_refused_shared_memory_is_asked_again(run):
    lines = run("""
kernel = load()
for _ in range(2):
    with pytest.raises(DriverError, match="cuFuncSetAttribute failed with FAKE") as caught:
        kernel.launch(**SIZE, arguments=ARGUMENTS, shared_bytes=2**20)
    assert (caught.value.call, caught.value.status) == ("cuFuncSetAttribute", 1)
with pytest.raises(DriverError, match="cuModuleGetFunction"):
    load("missing")
kernel.launch(**SIZE, arguments=ARGUMENTS)
print(record()[-1])
""")
    assert lines[0].startswith("launch") and lines[0].endswith("depth=1")


def test_facts_about_a_kernel(run):
    lines = run("""
kernel = load()
function = kernel.function
print(function.device, function.parameter_sizes)
print(function.shared_bytes, function.local_bytes, function.registers)
print(kernel.maximum_active_clusters(block=(64, 1, 1), shared_bytes=9, cluster=(4, 1, 1)))
print(record()[-1])
""")
    assert lines == [
        "1 [64, 12]",
        "101 103 104",
        "8",
        "clusters grid=4,1,1 block=64,1,1 shared=9 stream=0 attribute4=4,1,1 depth=1",
    ]


def test_tensor_maps_and_copies(run):
    lines = run("""
encode = extension().encode_tensor_map
asked = dict(data_type=9, shape=[256, 512], strides=[512], box=[64, 128], swizzle=3, l2_promotion=2)
assert encode(address=4096, **asked) == bytes([7]) * 128
with pytest.raises(DriverError, match="cuTensorMapEncodeTiled"):
    encode(address=4098, **asked)
with pytest.raises(ValueError, match="got 2, 2 and 2"):
    encode(address=4096, **{**asked, "strides": [2, 512]})
extension().copy_async(destination=1, source=2, nbytes=3, stream=0, device=0)
print("\\n".join(record()))
""")
    assert lines == [
        "encode type=9 rank=2 shape=256,512 strides=512 box=64,128 swizzle=3 l2=2 depth=0",
        "copy 1,2,3 depth=1",
    ]
