"""torch's own samples (OpInfo) of the operators that are lowered, with every operand remote."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from dak_inductor.compiled_graph import CompiledGraph
from dak_inductor.cuda_runtime.simulated import SimulatedTier
from dak_inductor.lowering import counters

from .profiles import PROFILE
from .test_random_programs import recording

pytest.importorskip("expecttest", reason="torch's samples need expecttest")
if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
    from torch.testing._internal.common_methods_invocations import op_db

LOWERED = (
    "addmm", "bmm", "index_select", "matmul", "mm", "nn.functional.embedding",
    "nn.functional.linear", "nn.functional.scaled_dot_product_attention", "__rmatmul__",
)  # fmt: skip
COMPOSED = (
    "baddbmm", "einsum", "inner", "mv", "nn.functional.embedding_bag",
    "nn.functional.multi_head_attention_forward", "take_along_dim", "tensordot",
)  # fmt: skip
"""Become one of the former, or are left alone; their samples are many, so CI leaves them out."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.int64)
NAMES = LOWERED if PROFILE == "ci" else LOWERED + COMPOSED


def remote(value: Any) -> Any:
    """A tensor of the same values and memory order in the remote tier, other things as they are."""
    if not isinstance(value, torch.Tensor) or 0 in value.stride() or value.numel() == 0:
        return value
    extent = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) + 1
    buffer = SimulatedTier(page_bytes=256).allocate(extent * value.element_size(), split=0)
    held = buffer.tensor(value.dtype, tuple(value.shape), value.stride()).copy_(value)
    torch._dynamo.mark_static_address(held)  # attention reads only caches that stay in place
    return held


def cases() -> list[Any]:
    return [
        pytest.param(info, dtype, id=f"{info.formatted_name}-{str(dtype)[6:]}")
        for info in op_db
        if info.name in NAMES
        for dtype in DTYPES
        if dtype in info.dtypes and (PROFILE != "ci" or dtype in DTYPES[:2])
    ]


@pytest.mark.parametrize(("info", "dtype"), cases())
def test_a_sample_of_torch_gives_eagers_result_from_the_remote_tier(
    info: Any, dtype: torch.dtype
) -> None:
    read = 0
    # torch's own wrapper chooses a kernel, in which Dynamo does not look
    op = F.scaled_dot_product_attention if "dot_product" in info.name else info.op
    # dak::attention adds in float32 in another order than torch's kernels; the rest is the same
    tolerance = {} if "attention" in info.name else {"rtol": 0, "atol": 0}
    for sample in info.sample_inputs("cpu", dtype):
        torch.manual_seed(0)
        leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        held = [remote(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]
        wanted = op(sample.input, *sample.args, **sample.kwargs)  # may write to its operands
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

        def call(*tensors: torch.Tensor, leaves=leaves, spec=spec, places=places) -> Any:
            filled = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                filled[place] = tensor
            first, args, kwargs = pytree.tree_unflatten(filled, spec)
            return op(first, *args, **kwargs)

        torch._dynamo.reset()
        made: list[CompiledGraph] = []
        counters.reset()
        torch.manual_seed(0)
        with torch.no_grad():
            result = torch.compile(call, backend=recording(made))(*held)
        for mine, theirs in zip(
            pytree.tree_leaves(result), pytree.tree_leaves(wanted), strict=True
        ):
            torch.testing.assert_close(mine, theirs, **tolerance, equal_nan=True)
        total = counters.total()
        assert total.local == 0
        read += total.remote
    assert read > 0 or info.name in COMPOSED
