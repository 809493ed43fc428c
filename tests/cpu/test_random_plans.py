"""Random plans for one program: any split of any tensor, any strategy, any window, the same bits.

On the simulated tier a product is one sum, whatever lies where; the kernels are asked by
`tests/gpu/test_random_programs_cuda.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dak_inductor.backend import compile_graph
from dak_inductor.options import BackendOptions
from dak_inductor.session import SESSION

from .profiles import examples
from .random_programs import TENSORS, Pool, Program, inputs, programs, tier

shares = st.lists(st.sampled_from((0.0, 1.0, 0.3, 0.77)), min_size=TENSORS, max_size=TENSORS)
options = st.builds(
    BackendOptions,
    strategy=st.sampled_from(("auto", "direct", "staged")),
    window=st.sampled_from((None, "auto", 1, 4096, 1 << 20)),
)


def bits(result: list[Tensor], pool: Pool) -> list[bytes]:
    """The outputs, and what the program left in the pool; of NaN as well."""
    return [
        tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for tensor in (*result, *pool.state_dict().values())
    ]


@given(
    programs(4),
    st.integers(0, 10**6),
    st.sampled_from((1, 5)),
    st.lists(st.tuples(options, shares), min_size=2, max_size=3),
)
@examples(8)
def test_plans_and_options_of_any_kind_give_the_same_bits(
    program: Program, seed: int, count: int, plans: list[tuple[BackendOptions, list[float]]]
) -> None:
    found: list[list[bytes]] = []
    for settings, split in plans:
        torch._dynamo.reset()
        SESSION.reset()
        pool = Pool(torch.float32, seed)
        contents = {name: value.clone() for name, value in pool.state_dict().items()}
        buffers = tier(pool, split)

        def backend(graph: Any, example: Any, chosen: BackendOptions = settings) -> Any:
            return compile_graph(graph, example, chosen, lambda module, _: module.forward)

        compiled = torch.compile(program.__call__, backend=backend)
        with torch.no_grad():
            for _, moved in plans:  # and under one compiled graph
                for buffer, share in zip(buffers.values(), moved, strict=True):
                    buffer.move(int(share * buffer.nbytes))
                pool.load_state_dict(contents)
                found.append(bits(compiled(pool, *inputs(count, torch.float32, seed)), pool))
    assert all(each == found[0] for each in found)
