"""Which inputs a graph writes to."""

from __future__ import annotations

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from dak_inductor.cuda_runtime.simulated import SimulatedTier
from dak_inductor.written_inputs import buffers_of, written_inputs


def written(function, *shapes: tuple[int, ...]) -> tuple[int, ...]:
    return written_inputs(make_fx(function)(*(torch.ones(shape) for shape in shapes)))


def test_in_place_operators_and_views_of_inputs() -> None:
    assert written(lambda x, w: x @ w, (2, 3), (3, 4)) == ()
    assert written(lambda x, w: w.add_(1) + x, (3,), (3,)) == (1,)
    assert written(lambda x, w: w.view(-1)[1:].mul_(2).sum() + x, (3,), (3, 2)) == (1,)
    assert written(lambda x, w: w.t().copy_(x), (2, 3), (3, 2)) == (1,)
    assert written(lambda x, w: (w + 1).mul_(x), (3,), (3,)) == ()


def test_what_is_only_read_by_a_writing_operator_is_not_written() -> None:
    assert written(lambda x, w: x.add_(w), (3,), (3,)) == (0,)


def test_results_given_by_keyword_and_in_lists() -> None:
    assert written(lambda x, w: torch.add(x, 1, out=w), (3,), (3,)) == (1,)
    assert written(lambda x, w: torch._foreach_add_([x, w], 1), (3,), (3,)) == (0, 1)


def test_buffers_among_the_written_inputs() -> None:
    buffer = SimulatedTier(page_bytes=256).allocate(1024, split=512)
    weight = buffer.tensor(torch.float32, (16, 16))
    arguments = (torch.ones(2), weight, 7, weight[4:])
    assert buffers_of(arguments, (0, 2)) == []
    assert buffers_of(arguments, (1, 3)) == [buffer, buffer]
