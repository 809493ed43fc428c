"""What Inductor generates for graphs on CUDA, on a machine without a GPU. Run as a script.

    python generate.py GUARD     prints a JSON object: case -> generated code

GUARD is a library with a no-op device guard for CUDA: a torch built without CUDA has none, and the
one of other builds wants a driver. The graphs are of fake tensors; what would ask the GPU for its
properties is told those of an H200.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from dak_inductor.lowering import inductor, registry

dak = torch.ops.dak
HALF = torch.bfloat16
DYNAMIC = "48"  # a dynamic size, and its hint

Shape = tuple[int | str, ...]
Inputs = tuple[tuple[Shape, torch.dtype], ...]


def linear_silu_residual(x, weight, bias, residual):
    return torch.nn.functional.silu(dak.linear.default(x, weight, bias)) + residual


def gated_from_one_weight(x, fused):
    half = fused.shape[0] // 2
    gate, up = fused[:half], fused[half:]
    return torch.nn.functional.silu(dak.linear.default(x, gate)) * dak.linear.default(x, up)


def conv1d_gelu(x, weight, bias):
    return torch.nn.functional.gelu(dak.addmm.default(bias, x, weight), approximate="tanh")


def plain_matmul(x, weight):
    return dak.matmul.default(x, weight)


def fused_epilogue(x, weight, bias, residual):
    return dak.linear_epilogue.default(x, weight, bias, residual, "gelu", "out_in")


def fused_gate(x, gate, up):
    return dak.gated_linear.default(x, gate, up, None, None, "silu", "out_in")


def eight_integers(x, weight):
    """A result of the size and dtype of a record, computed after the record's last use."""
    return dak.linear.default(x, weight).sum(0).to(torch.int64)


CASES: dict[str, tuple[Callable[..., Any], Inputs]] = {
    "linear": (
        linear_silu_residual,
        (((2, 5, 4096), HALF), ((8192, 4096), HALF), ((8192,), HALF), ((2, 5, 8192), HALF)),
    ),
    "gated, dynamic": (gated_from_one_weight, (((DYNAMIC, 1024), HALF), ((4096, 1024), HALF))),
    "in_out, tails": (conv1d_gelu, (((3, 772), HALF), ((772, 2300), HALF), ((2300,), HALF))),
    "float32": (plain_matmul, (((200, 512), torch.float32), ((512, 640), torch.float32))),
    "linear_epilogue": (
        fused_epilogue,
        (((DYNAMIC, 1000), HALF), ((520, 1000), HALF), ((520,), HALF), ((DYNAMIC, 520), HALF)),
    ),
    "eight integers": (eight_integers, (((300, 64), HALF), ((8, 64), HALF))),
    "gated_linear": (
        fused_gate,
        (((3, DYNAMIC, 256), HALF), ((512, 256), HALF), ((512, 256), HALF)),
    ),
}


@contextmanager
def pretended_gpu() -> Iterator[None]:
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime.hints import DeviceProperties

    facts: dict[str, Any] = {"multi_processor_count": 132, "major": 9}
    facts |= {"max_threads_per_multi_processor": 2048, "warp_size": 32}
    for_heuristics = DeviceProperties(
        type="cuda", index=0, cc=90, regs_per_multiprocessor=65536, **facts
    )
    properties = SimpleNamespace(
        minor=0,
        name="NVIDIA H200",
        shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472,
        **facts,
    )
    with ExitStack() as stack:
        for name, value in {
            "torch._subclasses.fake_tensor.init_gpu_context": lambda *_: None,
            "torch.cuda.is_available": lambda: True,
            "torch.cuda.device_count": lambda: 1,
            "torch.cuda.current_device": lambda: 0,
            "torch.cuda.get_device_capability": lambda *_: (9, 0),
            "torch.cuda.get_device_properties": lambda *_: properties,
            "torch.utils._triton.triton_hash_with_backend": lambda: "no driver",
        }.items():
            stack.enter_context(patch(name, value))
        stack.enter_context(
            patch.object(DeviceProperties, "create", staticmethod(lambda *_: for_heuristics))
        )
        for name, static in {
            "get_device_properties": lambda *_: properties,
            "current_device": lambda: 0,
        }.items():
            stack.enter_context(patch.object(CudaInterface.Worker, name, staticmethod(static)))
        yield


def generate(function: Callable[..., Any], inputs: Inputs) -> str:
    from torch._dynamo.source import ConstantSource
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    environment = ShapeEnv()
    symbols: dict[str, Any] = {}

    def size(value: int | str) -> Any:
        if isinstance(value, int):
            return value
        if value not in symbols:
            source, hint = ConstantSource(f"m{value}"), int(value)
            symbol = environment.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
            symbols[value] = environment.create_symintnode(symbol, hint=hint, source=source)
        return symbols[value]

    mode = FakeTensorMode(shape_env=environment)
    with torch.no_grad(), mode:
        arguments = [
            torch.empty(tuple(map(size, shape)), dtype=dtype, device="cuda")
            for shape, dtype in inputs
        ]
        graph = make_fx(function, decomposition_table=select_decomp_table())(*arguments)
        lowering = GraphLowering(
            graph, example_inputs=arguments, shape_env=environment, is_inference=True
        )
        with (
            V.set_graph_handler(lowering),
            V.set_fake_mode(mode),
            V.set_debug_handler(DebugContext()),
        ):
            lowering.run(*arguments)
            code = lowering.codegen()[0]
    return str(getattr(code, "value", code))


def main() -> None:
    ctypes.CDLL(sys.argv[1])
    inductor.register()
    with pretended_gpu():
        with registry.only("triton"):
            code = {name: generate(*case) for name, case in CASES.items()}
        with registry.only("cuda"):
            code["for the CUDA template"] = generate(*CASES["linear_epilogue"])
    print(json.dumps(code))


if __name__ == "__main__":
    main()
