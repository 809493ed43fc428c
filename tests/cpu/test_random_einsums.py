"""Random einsums with weights: eager's values, shapes and memory order, each byte read once."""

from __future__ import annotations

import copy
import random

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import dak_inductor as dak
from dak_inductor import contraction
from dak_inductor.contraction import Operand, contract
from dak_inductor.einsum import memory_order, read_equation
from dak_inductor.offloaded import record_of
from dak_inductor.session import SESSION

from .profiles import examples
from .program_check import DTYPES, assert_close
from .test_backend import backend, call

seeds = st.integers(0, 10**6)


def random_equation(
    chance: random.Random, sizes: tuple[int, ...]
) -> tuple[str, list[list[int]], list[list[int]]]:
    """An equation of two operands, their shapes, and a permutation for each."""
    size = dict(zip("abcdefg", chance.choices(sizes, k=7), strict=True))
    parts: tuple[list[str], ...] = ([], [], [], [])
    for label in chance.sample("abcdefg", chance.randint(2, 6)):
        chance.choice(parts).append(label)
    batch, summed, left, right = parts
    names = [batch + summed + left, batch + summed + right, batch + left + right]
    for name in names:
        chance.shuffle(name)
    shapes = [[size[label] for label in name] for name in names[:2]]
    texts = list(map("".join, names))
    if chance.random() < 0.1 and texts[1]:
        texts[1] += texts[1][0]  # a diagonal
        shapes[1].append(shapes[1][0])
    if chance.random() < 0.2:
        longer = chance.randrange(2)
        hidden = [2, 3][: chance.randint(1, 2)]
        shapes[longer] = hidden + shapes[longer]
        texts[longer] = "..." + texts[longer]
        texts[2] = "..." + texts[2]
    orders = [chance.sample(range(len(shape)), len(shape)) for shape in shapes]
    return "{},{}->{}".format(*texts), shapes, orders


def strided(shape: list[int], order: list[int], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Dimensions lie in memory in the given order."""
    tensor = torch.randn([shape[dim] for dim in order], dtype=dtype)
    return tensor.permute([order.index(dim) for dim in range(len(order))])


@given(seeds)
@examples(400)
def test_contractions_have_eagers_values_and_memory_order(seed):
    chance = random.Random(seed)
    torch.manual_seed(seed)
    equation, shapes, orders = random_equation(chance, (0, 1, 2, 3, 4, 5))
    tensors = list(map(strided, shapes, orders))
    eager = torch.einsum(equation, *tensors)
    read = read_equation(equation, [tensor.dim() for tensor in tensors])
    first, second = map(Operand, tensors, read.operands)
    memory = memory_order(first, second, read.result)
    for pair in ((first, second), (second, first)):
        result = _without_bounds(*pair, read.result, memory)
        if result is None:
            continue
        torch.testing.assert_close(result, eager)
        assert_lies_as(result, eager)


def assert_lies_as(result, eager):
    """Sizes of 1 have no stride to speak of, nor has what is empty."""
    steps = zip(result.shape, result.stride(), eager.stride(), strict=True)
    assert all(ours == theirs for n, ours, theirs in steps if n > 1 and eager.numel())


def _without_bounds(x, weight, result, memory):
    """Whatever is copied, so that every order of dimensions is tried."""
    bound, contraction.is_small = contraction.is_small, lambda *_, **__: True
    try:
        return contract(x, weight, result, memory)
    finally:
        contraction.is_small = bound


class Einsum(nn.Module):
    """The weight is a view with its dimensions in another order than its memory."""

    def __init__(self, equation: str, weight: torch.Tensor, order: list[int], *, first: bool):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.equation, self.order, self.first = equation, order, first

    def forward(self, x):
        weight = self.weight.permute(self.order)
        return torch.einsum(self.equation, *((weight, x) if self.first else (x, weight)))


@given(seeds, st.sampled_from(DTYPES), st.sampled_from((None, True)))
@examples(40)
def test_einsums_through_the_backend_read_each_byte_once(seed, dtype, dynamic):
    chance = random.Random(seed)
    torch.manual_seed(seed)
    equation, shapes, orders = random_equation(chance, (1, 8, 16))
    side = chance.randrange(2)
    if torch.Size(shapes[side]).numel() * dtype.itemsize < 4096:  # smaller ones stay whole
        return
    memory = torch.randn([shapes[side][dim] for dim in orders[side]], dtype=dtype)
    order = [orders[side].index(dim) for dim in range(len(orders[side]))]
    model = Einsum(equation, memory, order, first=side == 0)
    x = strided(shapes[1 - side], orders[1 - side], dtype)
    expected = call(model, x)
    exact = call(copy.deepcopy(model).double(), x.double())
    torch._dynamo.reset()
    SESSION.reset()
    dak.offload(model, offload_ratio=0.5, remote="simulated")
    dak.stats(reset=True)
    result = call(torch.compile(model, backend=backend(), dynamic=dynamic), x)
    assert_lies_as(result, expected)
    assert_close(result.contiguous(), expected.contiguous(), exact.contiguous())
    held = record_of(model).bytes_by_tier()
    assert held.remote > 0
    assert dak.stats().total == held
    for binding in SESSION.bindings():
        stock = any(op.kind == "stock" for op in binding.table.ops)
        assert stock <= bool(binding.table.refusals)
