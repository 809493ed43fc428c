"""The extension's own declarations of the driver interface agree with NVIDIA's header."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[3] / "cuda_runtime" / "src"

STRUCTURES = {
    "MemLocation": ("CUmemLocation", "type id"),
    "MemAllocationProp": (
        "CUmemAllocationProp",
        "type requestedHandleTypes location win32HandleMetaData allocFlags",
    ),
    "MemAccessDesc": ("CUmemAccessDesc", "location flags"),
    "LaunchAttribute": ("CUlaunchAttribute", "id value"),
    "LaunchAttributeValue": ("CUlaunchAttributeValue", "clusterDim priority cooperative"),
    "LaunchConfig": (
        "CUlaunchConfig",
        "gridDimX gridDimY gridDimZ blockDimX blockDimY blockDimZ sharedMemBytes hStream attrs "
        "numAttrs",
    ),
    "TensorMap": ("CUtensorMap", "opaque"),
}

# prefix here -> prefix in cuda.h, tried in order
PREFIXES = {
    "SUCCESS": "CUDA_SUCCESS",
    "ERROR_": "CUDA_ERROR_",
    "DEVICE_": "CU_DEVICE_ATTRIBUTE_",
    "LOCATION_": "CU_MEM_LOCATION_TYPE_",
    "ALLOCATION_": "CU_MEM_ALLOCATION_TYPE_",
    "HANDLE_": "CU_MEM_HANDLE_TYPE_",
    "ACCESS_": "CU_MEM_ACCESS_FLAGS_PROT_",
    "GRANULARITY_": "CU_MEM_ALLOC_GRANULARITY_",
    "STREAM_": "CU_STREAM_",
    "EVENT_": "CU_EVENT_",
    "MEMHOST_": "CU_MEMHOSTREGISTER_",
    "CAPTURE_": "CU_STREAM_CAPTURE_",
    "PROC_": "CU_GET_PROC_ADDRESS_",
    "FUNCTION_": "CU_FUNC_ATTRIBUTE_",
    "LAUNCH_": "CU_LAUNCH_ATTRIBUTE_",
    "TENSOR_MAP_": "CU_TENSOR_MAP_DATA_TYPE_",
    "INTERLEAVE_": "CU_TENSOR_MAP_INTERLEAVE_",
    "SWIZZLE_": "CU_TENSOR_MAP_SWIZZLE_",
    "L2_": "CU_TENSOR_MAP_L2_PROMOTION_",
    "FILL_": "CU_TENSOR_MAP_FLOAT_OOB_FILL_",
}
SPECIAL = {
    "CAPTURE_GLOBAL": "CU_STREAM_CAPTURE_MODE_GLOBAL",
    "CAPTURE_THREAD_LOCAL": "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL",
    "CAPTURE_RELAXED": "CU_STREAM_CAPTURE_MODE_RELAXED",
    "CAPTURE_NONE": "CU_STREAM_CAPTURE_STATUS_NONE",
    "CAPTURE_ACTIVE": "CU_STREAM_CAPTURE_STATUS_ACTIVE",
    "CAPTURE_INVALIDATED": "CU_STREAM_CAPTURE_STATUS_INVALIDATED",
    "L2_64B": "CU_TENSOR_MAP_L2_PROMOTION_L2_64B",
    "L2_128B": "CU_TENSOR_MAP_L2_PROMOTION_L2_128B",
    "L2_256B": "CU_TENSOR_MAP_L2_PROMOTION_L2_256B",
    "PROC_FOUND": "CU_GET_PROC_ADDRESS_SUCCESS",
    "PROC_NOT_FOUND": "CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND",
    "PROC_VERSION_TOO_OLD": "CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT",
    "FILL_ZERO": "CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE",
}

SIGNATURES = """
template <class A, class B> struct Same;
template <class... A, class... B>
struct Same<CUresult (*)(A...), dak::cu::Result (*)(B...)> {
  static constexpr bool value = [] {
    if constexpr (sizeof...(A) != sizeof...(B)) return false;
    else return ((sizeof(A) == sizeof(B) && std::is_pointer_v<A> == std::is_pointer_v<B>) && ...);
  }();
};
#define CHECK(name, ...) \\
  static_assert(Same<decltype(&::name), dak::cu::Result (*)(__VA_ARGS__)>::value, #name);
namespace dak { DAK_DRIVER_FUNCTIONS(CHECK) }
"""


def cuda_header() -> Path:
    """cuda.h of a toolkit or of NVIDIA's Python packages; skips where there is none."""
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    places += sorted(Path("/usr/local").glob("cuda-*/include"))
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    places += [packages / "cuda_runtime" / "include", *packages.glob("cu*/include")]
    found = next((place for place in places if (place / "cuda.h").exists()), None)
    if found is None:
        pytest.skip("no cuda.h: neither a CUDA toolkit nor the nvidia-cuda-runtime package")
    return found


def constants(text: str) -> list[str]:
    names = re.findall(r"constexpr (?:Result|unsigned int) (\w+) =", text)
    for body in re.findall(r"enum \w+ : int \{(.*?)\}", text, re.S):
        names += [entry.split("=")[0].strip() for entry in body.split(",") if entry.strip()]
    return names


def driver_name(name: str) -> str:
    if name in SPECIAL:
        return SPECIAL[name]
    prefix = next(prefix for prefix in PREFIXES if name.startswith(prefix))
    return PREFIXES[prefix] + name.removeprefix(prefix)


def test_declarations_agree_with_the_header(tmp_path: Path) -> None:
    include = cuda_header()
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler")
    names = constants((SOURCE / "driver_types.h").read_text())
    assert len(names) > 70
    lines = [
        "#include <cuda.h>",
        "#include <cstddef>",
        "#include <type_traits>",
        '#include "driver.h"',
    ]
    for ours, (theirs, fields) in STRUCTURES.items():
        lines.append(f"static_assert(sizeof(dak::cu::{ours}) == sizeof({theirs}));")
        lines.append(f"static_assert(alignof(dak::cu::{ours}) == alignof({theirs}));")
        for field in fields.split():
            offsets = f"offsetof(dak::cu::{ours}, {field}) == offsetof({theirs}, {field})"
            lines.append(f"static_assert({offsets});")
    for name in names:
        theirs = driver_name(name)
        lines.append(f"static_assert((long)dak::cu::{name} == (long){theirs});")
    source = tmp_path / "declarations.cpp"
    source.write_text("\n".join(lines) + SIGNATURES)
    command = [compiler, "-std=c++20", "-fsyntax-only", f"-I{include}", f"-I{SOURCE}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
