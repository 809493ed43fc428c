"""The portable attention kernels: interpreted on the CPU, compiled for GPUs, and their shapes."""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from dak_inductor.lowering.triton_attention.configuration import (
    DEFAULT_WINDOW,
    PARTIAL_BYTES,
    chunk_tokens,
    tile_shape,
)

ATTENTION = "dak_inductor.lowering.triton_attention"
INTERPRETED = Path(__file__).with_name("interpreted_attention.py")


def test_values_and_counts_in_the_interpreter() -> None:
    import numpy
    import triton

    if triton.__version__ < "3.7" and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.skip("the interpreter of triton 3.6 needs a numpy older than 2.4")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(INTERPRETED)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTEST_ADDOPTS": "",
            "CUDA_VISIBLE_DEVICES": "",
        },
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " failed" not in done.stdout


# --- shapes ---


def test_tiles_fit_the_shared_memory_of_small_cards() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for head in (16, 64, 80, 96, 128, 192, 256):
            for rows in (1, 8, 16, 17, 64, 65, 4096):
                shape = tile_shape(rows, head, head, dtype)
                assert shape.rows >= min(rows, 16) and shape.head_columns >= head
                held = shape.bytes_in_flight(dtype.itemsize) // max(shape.stages - 1, 1)
                held = (shape.stages - 1) * held + shape.rows * shape.head_columns * dtype.itemsize
                assert held <= 99 * 1024
                assert shape.bytes_in_flight(dtype.itemsize) <= DEFAULT_WINDOW // 4


def test_chunks_fill_the_grid_and_bound_the_partial_results() -> None:
    for tokens in (1, 100, 1000, 100_000, 1_000_000):
        for groups in (1, 8, 1024):
            size = chunk_tokens(
                tokens=tokens, groups=groups, rows=4 * groups, value_dim=128, programs=264, block=64
            )
            assert size % 64 == 0 and size >= 128
            chunks = -(-tokens // size)
            assert chunks * 4 * groups * 129 * 4 <= PARTIAL_BYTES or chunks == 1
            if tokens >= 100_000 and groups <= 8:
                assert chunks * groups >= 2 * 264 or size == 128


# --- code ---


@dataclasses.dataclass(frozen=True)
class Built:
    ptx: str
    shared_bytes: int
    stack_bytes: int


def built(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], architecture: int, **options: int
) -> Built:
    """A kernel compiled for sm_`architecture`; pointers and strides are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    aligned = [["tt.divisibility", 16]]
    strides = ("_batch", "_head", "_row", "_token", "_segment")
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (index,): aligned
            for index, name in enumerate(names)
            if name not in constants and (types[name][0] == "*" or name.endswith(strides))
        },
    )
    target = GPUTarget("cuda", architecture, 32)
    code = triton.compile(source, target=target, options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with_cubin = subprocess.run(
        ["/bin/sh", "-c", f"cat > $0 && {tool} --dump-resource-usage $0; rm -f $0",
         f"/dev/shm/dak-{id(code)}.cubin"],
        input=code.asm["cubin"], capture_output=True, check=True,
    ).stdout.decode()  # fmt: skip
    used = dict(w.split(":") for w in with_cubin.split() if w.startswith("STACK:"))
    return Built(code.asm["ptx"], code.metadata.shared, int(used["STACK"]))


def types_of(kernel: Any, element: str, result: str) -> dict[str, str]:
    known = {"Q": element, "K": element, "V": element, "OUT": result, "LSE": "fp32"}
    found = {name: f"*{kind}" for name, kind in known.items()}
    found |= {"LENGTHS": "*i32", "STARTS": "*i32", "scale": "fp32", "softcap": "fp32"}
    found |= {"K_RECORD": "*i64", "V_RECORD": "*i64"}
    return {name: found.get(name, "i32") for name in kernel.arg_names}


ELEMENTS = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    ("element", "head"), [("bf16", 64), ("bf16", 80), ("bf16", 128), ("bf16", 256), ("fp32", 64)]
)
@pytest.mark.parametrize(("name", "rows"), [("decode", 4), ("decode", 64), ("forward", 4096)])
def test_kernels_compile(name: str, rows: int, element: str, head: int, architecture: int) -> None:
    module = importlib.import_module(f"{ATTENTION}.{name}")
    kernel = getattr(module, f"{name}_kernel")
    shape = tile_shape(rows, head, head, ELEMENTS[element])
    itemsize = ELEMENTS[element].itemsize
    constants: dict[str, Any] = {
        "GROUP": 4, "HEAD": head, "VALUE": head, "CAUSAL": True, "HAS_LENGTHS": True,
        "HAS_STARTS": True, "SOFTCAP": False, "PRECISION": "ieee", "BLOCK_M": shape.rows,
        "BLOCK_N": shape.tokens, "BLOCK_D": shape.head_columns, "BLOCK_V": shape.value_columns,
    }  # fmt: skip
    if name == "decode":
        constants |= {
            "ITEMSIZE": itemsize, "TOKEN_MAJOR": True, "ONE_BUFFER": False,
            "BYTES_IN_FLIGHT": shape.bytes_in_flight(itemsize), "DEFAULT_WINDOW": DEFAULT_WINDOW,
            "BLOCK_B": 1, "BLOCK_H": 8,
        }  # fmt: skip
    result = "fp32" if name == "decode" else element
    code = built(
        kernel, types_of(kernel, element, result), constants, architecture,
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    assert code.stack_bytes <= 64, "registers are spilled"
    assert "cp.async" in code.ptx, "the loads are not pipelined"
    if element == "bf16":
        assert "wgmma.mma_async" in code.ptx or "mma.sync" in code.ptx
    limit = 227 if architecture == 90 else 163
    assert code.shared_bytes <= limit * 1024
