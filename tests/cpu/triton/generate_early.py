"""Kernels that start early, as Inductor generates them on a machine without a GPU. Run as a script.

    python generate_early.py GUARD     prints a JSON object: how it was compiled -> case -> code

`ours` is with the value that the backend gives `triton.enable_pdl`, `inductor` with True, before
anything was patched; of a few cases also with True after that (`inductor again`) and with False
(`off`). `backend` is one graph through the backend, or beside it. GUARD is as in `generate.py`.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.inductor_prims
from generate import HALF, Inputs, fused_epilogue, generate, pretended_gpu
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dak_inductor import backend
from dak_inductor.lowering import early_start, inductor, op_facts, registry

FLOAT = torch.float32


@dataclass(frozen=True, slots=True)
class Case:
    """A function, its inputs on CUDA, and settings of Inductor's that lead to a kind of kernel."""

    function: Callable[..., Any]
    inputs: Inputs
    settings: dict[str, Any] = field(default_factory=dict)


def product(x, weight):
    return torch.ops.dak.linear_epilogue.default(x, weight, None, None, "none", "out_in")


def residual_over_a_product(x, weight):
    """A kernel, ours, and one that reads what both have written, that of the first one first."""
    first = torch.softmax(x, -1)
    return first.relu() - product(first, weight)


def fill_before_a_product(x, y, weight):
    """The product reads what a kernel wrote that may still run where the fill has not waited."""
    first = torch.softmax(x, -1)
    blank = x.new_full((5000,), 3.0)
    return product(first, weight), blank, y.relu()


def behind_a_product(x, weight):
    return product(x, weight).relu()


def pointwise_behind_reduction(x):
    return torch.nn.functional.gelu(x) + x.float().mean(-1, keepdim=True).to(x.dtype)


def fills(x):
    return torch.full((4096,), 3.0, device=x.device)


def in_place(x, y):
    x.add_(y)
    return x * 2


def scatter_add(x, index, values):
    return x.index_put((index,), values, accumulate=True)


def many(x, y):
    return x.relu(), y.softmax(-1), x.new_zeros(1000), y.sum(0)


def foreach(x, y):
    return torch._foreach_add([x, y], 1.0)


def random(x, seeds):
    seed = torch.ops.prims.inductor_lookup_seed(seeds, 1)
    return x + torch.ops.prims.inductor_random([1000], seed, "rand")


ROW = ((8, 1024), HALF)
LONG = ((8, 1 << 18), HALF)
COMBO = {"combo_kernels": True, "combo_kernel_allow_mixed_sizes": 2}
SUM = {"split_reductions": False}
CASES: dict[str, Case] = {
    "pointwise": Case(lambda x, y: torch.nn.functional.silu(x) * y, (ROW, ROW)),
    "dynamic": Case(lambda x: x.relu() + 1, ((("48", 1000), HALF),)),
    "persistent reduction": Case(pointwise_behind_reduction, (ROW,)),
    "looped reduction": Case(lambda x: x.float().softmax(-1), (LONG,), SUM),
    "split reduction": Case(lambda x: x.float().sum(), (LONG,)),
    "welford": Case(lambda x: torch.var_mean(x.float(), -1), (LONG,), SUM),
    "cooperative reduction": Case(
        lambda x: x.float().softmax(-1), (LONG,), {"triton.force_cooperative_reductions": True}
    ),
    "scan": Case(lambda x: x.cumsum(-1), (((4, 5000), FLOAT),)),
    "split scan": Case(lambda x: x.cumsum(-1), (((1 << 20,), FLOAT),)),
    "sort": Case(lambda x: x.sort(-1).values, (((64, 64), FLOAT),)),
    "transpose": Case(lambda x, y: x.t() + y, (((512, 640), HALF), ((640, 512), HALF))),
    "block pointers": Case(
        lambda x, y: x.t() + y,
        (((512, 640), HALF), ((640, 512), HALF)),
        {"triton.use_block_ptr": True},
    ),
    "descriptors": Case(
        lambda x, y: (x + y).sum(-1),
        (((512, 640), HALF), ((512, 640), HALF)),
        {"triton.use_tensor_descriptor": True, "assume_aligned_inputs": True},
    ),
    "fill": Case(fills, (ROW,)),
    "in place": Case(in_place, (ROW, ROW)),
    "atomic": Case(scatter_add, (((100, 64), FLOAT), ((37,), torch.int64), ((37, 64), FLOAT))),
    "gather": Case(lambda x, i: x[i] * 2, (((100, 64), HALF), ((37,), torch.int64))),
    "bucketize": Case(torch.bucketize, (((1000,), FLOAT), ((50,), FLOAT))),
    "random": Case(random, (((1000,), FLOAT), ((2,), torch.int64))),
    "combo": Case(many, (ROW, ((96, 512), HALF)), COMBO),
    "foreach": Case(foreach, (ROW, ROW)),
    "residual over a product": Case(
        residual_over_a_product, (((4, 1024), HALF), ((1024, 1024), HALF))
    ),
    "fill before a product": Case(
        fill_before_a_product, (((4, 1024), HALF), ROW, ((1024, 1024), HALF))
    ),
    "behind a product": Case(behind_a_product, (((4, 1024), HALF), ((512, 1024), HALF))),
}
TEMPLATE = Case(
    fused_epilogue, (((33, 1000), HALF), ((520, 1000), HALF), ((520,), HALF), ((33, 520), HALF))
)
FEW = ("pointwise", "looped reduction", "atomic", "foreach")
GRAPH = CASES["pointwise"]
NEED_A_GPU = (
    "torch.cuda.device.__enter__",
    "torch.cuda.device.__exit__",
    "torch.cuda.set_rng_state",
    "torch._inductor.fx_passes.joint_graph.lazy_init",
    "torch._inductor.fx_passes.post_grad.lazy_init",
)


def code_of(case: Case, value: object) -> str:
    from torch._inductor import config

    with config.patch({**case.settings, early_start.ENTRY: value}):
        code = generate(case.function, case.inputs)
    setattr(config, early_start.ENTRY, early_start._unset())  # a patch leaves what it found as set
    return code


def all_of(value: object) -> dict[str, str]:
    with registry.only("cuda"):
        code = {name: code_of(case, value) for name, case in CASES.items()}
    with registry.only("triton"):
        return {**code, "template": code_of(TEMPLATE, value)}


class GeneratedError(Exception):
    """Ends a compile before the code would be loaded, which needs a GPU."""


def compiled_by(executor: Callable[[Any, Any], Any]) -> str:
    """The code of a graph that `executor` takes as Dynamo's."""
    from torch._guards import TracingContext, tracing
    from torch._inductor.graph import GraphLowering

    found: list[str] = []

    def stop(lowering: Any) -> Any:
        code = lowering.codegen()[0]
        found.append(str(getattr(code, "value", code)))
        raise GeneratedError

    mode = FakeTensorMode()
    with mode:
        arguments = [
            torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in GRAPH.inputs
        ]
    graph = make_fx(GRAPH.function, tracing_mode="fake")(*arguments)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(tracing(TracingContext(mode)))
        stack.enter_context(patch.object(GraphLowering, "compile_to_module", stop))
        for name in NEED_A_GPU:
            stack.enter_context(patch(name, lambda *_: None))
        stack.enter_context(patch("torch.cuda.get_rng_state", lambda *_: torch.zeros(16)))
        try:
            executor(graph, arguments)
        except Exception:
            if not found:
                raise
    return found[0]


def through_the_backend() -> dict[str, str]:
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    entry: Any = config
    code = {
        "by default": compiled_by(backend._inductor({})),
        "by default again": compiled_by(backend._inductor({})),
        "plain afterwards": compiled_by(compile_fx),
        "switched on": compiled_by(backend._inductor({early_start.ENTRY: True})),
        "switched off": compiled_by(backend._inductor({early_start.ENTRY: False})),
    }
    with config.patch({early_start.ENTRY: True}):
        code["on by configuration"] = compiled_by(backend._inductor({}))
        code["plain, on by configuration"] = compiled_by(compile_fx)
    entry.triton.enable_pdl = False
    code["off by configuration"] = compiled_by(backend._inductor({}))
    setattr(config, early_start.ENTRY, early_start._unset())
    code["plain in another thread"] = beside_ours(lambda: compiled_by(compile_fx))
    return code


def beside_ours(compile_it: Callable[[], str]) -> str:
    """What another thread compiles while this one is in a compile of the backend's.

    Dynamo holds its lock for a compile; settings of torch 2.11 are those of all threads.
    """
    from torch._dynamo.convert_frame import compile_lock
    from torch._inductor import config

    alone = isinstance(vars(config)["_config"][early_start.ENTRY].user_override, ContextVar)
    found: list[str] = []

    def other() -> None:
        if alone:
            found.append(compile_it())
            return
        with compile_lock:
            found.append(compile_it())

    thread = threading.Thread(target=other)
    with compile_lock, config.patch({early_start.ENTRY: early_start.MARK}):
        thread.start()
        thread.join(timeout=None if alone else 0.5)
        assert early_start._marked()
    thread.join()
    return found[0]


def main() -> None:
    ctypes.CDLL(sys.argv[1])
    inductor.register()
    assert early_start.unavailable() is None
    with pretended_gpu(), patch.object(op_facts, "extension_importable", lambda: True):
        code = {"inductor": all_of(True)}
        code["backend"] = through_the_backend()
        code["ours"] = all_of(early_start.MARK)
        for way, value in (("inductor again", True), ("off", False)):
            code[way] = {name: code_of(CASES[name], value) for name in FEW}
    print(json.dumps(code))


if __name__ == "__main__":
    main()
