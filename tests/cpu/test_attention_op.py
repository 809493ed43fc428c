"""dak::attention: values against float64, strides, bytes by tier, and what is refused."""

from __future__ import annotations

import itertools
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from dak_inductor.cuda_runtime.simulated import SimulatedTier
from dak_inductor.cuda_runtime.tier_bytes import TierBytes
from dak_inductor.lowering import counters, ops_attention, stock_attention
from dak_inductor.lowering.attention.operands import AttentionOperands
from dak_inductor.lowering.ops_attention import ATTENTION_OPERATOR

B, S, D = 3, 24, 16
attention = torch.ops.dak.attention


@pytest.fixture(autouse=True)
def _no_counts():
    counters.reset()
    yield
    counters.reset()


def call(query, key, value, **options: Any) -> torch.Tensor:
    chosen = {
        "lengths": None, "starts": None, "mask": None, "scale": query.shape[-1] ** -0.5,
        "causal": False, "window": 0, "softcap": 0.0, **options,
    }  # fmt: skip
    return attention(query, key, value, *chosen.values())


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def by_loops(query, key, value, *, lengths, starts, mask, causal, window, softcap) -> torch.Tensor:
    """The contract, sentence by sentence, in float64; no tensor operation decides on a token."""
    batch, heads, rows, depth = query.shape
    kv_heads, tokens = key.shape[1:3]
    q, k, v = query.double(), key.double(), value.double()
    result = torch.zeros(batch, heads, rows, value.shape[3], dtype=torch.float64)
    if mask is not None:
        mask = mask.expand(batch, heads, rows, tokens)
    for b, h, i in itertools.product(range(batch), range(heads), range(rows)):
        length = tokens if lengths is None else int(lengths[b])
        start = 0 if starts is None else int(starts[b])
        group = h // (heads // kv_heads)
        seen = [
            t
            for t in range(start, length)
            if not (causal and t > length - rows + i)
            and not (window and t <= length - rows + i - window)
            and not (mask is not None and mask.dtype == torch.bool and not mask[b, h, i, t])
        ]
        scores = k[b, group, seen] @ q[b, h, i] * depth**-0.5
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None and mask.dtype != torch.bool:
            scores = scores + mask[b, h, i, seen].double()
        if seen and scores.max() > float("-inf"):
            result[b, h, i] = torch.softmax(scores, 0) @ v[b, group, seen]
    return result


def masks(rows: int, heads: int) -> dict[str, torch.Tensor | None]:
    return {
        "none": None,
        "bool": torch.rand(B, 1, rows, S) > 0.3,
        "bool per head": torch.rand(1, heads, 1, S) > 0.3,
        "float": torch.randn(rows, S),
        "float with -inf": torch.randn(B, 1, 1, S).masked_fill(
            torch.rand(B, 1, 1, S) > 0.7, -1e400
        ),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(masks(1, 1)))
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads"), [(1, 8, 2), (5, 4, 4), (5, 6, 2), (24, 2, 1)]
)
def test_values_are_within_twice_the_error_of_torch(rows, heads, kv_heads, kind, dtype):
    query = torch.randn(B, heads, rows, D, dtype=dtype)
    key, value = (torch.randn(B, kv_heads, S, D, dtype=dtype) for _ in range(2))
    mask = masks(rows, heads)[kind]
    lengths, starts = int32(24, 17, 9), int32(0, 3, 8)
    for bounds, causal, window, softcap in itertools.product(
        ((None, None), (lengths, None), (lengths, starts)), (False, True), (0, 6), (0.0, 3.0)
    ):
        options = {
            "lengths": bounds[0], "starts": bounds[1], "mask": mask, "causal": causal,
            "window": window, "softcap": softcap,
        }  # fmt: skip
        exact = by_loops(query, key, value, **options)
        result = call(query, key, value, **options)
        assert result.dtype == dtype
        # what rounding the operands' products and the result to this dtype costs at least
        torches = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        in_double = F.scaled_dot_product_attention(
            query.double(), key.double(), value.double(), enable_gqa=True
        )
        allowed = 2 * (torches.double() - in_double).abs().max() + 3 * torch.finfo(dtype).eps
        assert (result.double() - exact).abs().max() <= allowed * (3 if softcap else 1), options


def test_without_a_mask_it_is_what_eager_computes_bit_for_bit():
    key, value = torch.randn(B, 2, S, D), torch.randn(B, 2, S, D)
    for rows, causal in ((1, False), (1, True), (S, True), (5, False)):
        query = torch.randn(B, 6, rows, D)
        eager = F.scaled_dot_product_attention(
            query, key, value, is_causal=causal and rows > 1, enable_gqa=True
        )
        torch.testing.assert_close(call(query, key, value, causal=causal), eager, rtol=0, atol=0)


def test_rows_that_see_nothing_are_zero_whatever_hides_the_tokens():
    query, key, value = torch.randn(2, 4, 3, D), torch.randn(2, 2, S, D), torch.randn(2, 2, S, D)
    empty = call(query, key, value, lengths=int32(0, 2), causal=True)
    assert torch.equal(empty[0], torch.zeros(4, 3, D))
    assert torch.equal(empty[1, :, 0], torch.zeros(4, D)), (
        "2 tokens, 3 queries: the first sees none"
    )
    assert empty[1, :, 1:].abs().min() > 0
    hidden = torch.ones(2, 1, 3, S, dtype=torch.bool)
    hidden[1, 0, 2] = False
    for mask in (hidden, torch.zeros(2, 1, 3, S).masked_fill(~hidden, float("-inf"))):
        for softcap in (0.0, 5.0):
            result = call(query, key, value, mask=mask, softcap=softcap)
            assert torch.equal(result[1, :, 2], torch.zeros(4, D))
            assert result.isfinite().all()
    assert torch.equal(call(query, key, value, starts=int32(S, 0))[0], torch.zeros(4, 3, D)), (
        "a sequence of padding only"
    )
    # the lowest finite number hides nothing from a row that sees nothing else: torch averages
    lowest = torch.full((2, 1, 3, S), torch.finfo(torch.float32).min)
    averaged = call(query, key, value, mask=lowest)
    expected = value.mean(2, keepdim=True).repeat_interleave(2, 1).expand(2, 4, 3, D)
    torch.testing.assert_close(averaged, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "shape", [(3, 4, 5), (3, 4, 1), (1, 4, 1), (1, 1, 1), (1, 4, 7), (2, 4, 0)]
)
def test_the_result_is_stored_by_rows_on_every_path(shape):
    batch, heads, rows = shape
    query = torch.randn(batch, rows, heads, D).transpose(1, 2)
    wanted = torch.empty(batch, rows, heads, 8).transpose(1, 2).stride()
    key, value = torch.randn(batch, 1, S, D), torch.randn(batch, 1, S, 8)
    paths = {
        "no mask": {},
        "lengths": {"lengths": torch.full((batch,), 5, dtype=torch.int32)},
        "softcap": {"softcap": 2.0},
    }
    for options in paths.values():
        assert call(query, key, value, **options).stride() == wanted
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [mode.from_tensor(tensor) for tensor in (query, key, value)]
            assert call(*fakes, **options).stride() == wanted
    empty = call(query, key[:, :, :0], value[:, :, :0])
    assert torch.equal(empty, torch.zeros(batch, heads, rows, 8))
    assert empty.stride() == wanted


@pytest.mark.parametrize("test", ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"])
def test_the_operator_is_registered_as_torch_asks(test):
    query, key, value = torch.randn(2, 4, 3, D), torch.randn(2, 2, S, D), torch.randn(2, 2, S, D)
    for options in (
        (None, None, None, 0.25, True, 0, 0.0),
        (int32(9, 4), int32(0, 1), torch.rand(3, S) > 0.5, 0.25, True, 4, 3.0),
    ):
        torch.library.opcheck(attention.default, (query, key, value, *options), test_utils=(test,))


def test_the_stock_composition_asks_the_device_for_nothing():
    """A fake tensor has no values: whatever read one would raise."""
    with FakeTensorMode() as mode:
        query, key, value = (mode.from_tensor(torch.randn(2, 2, n, D)) for n in (3, S, S))
        bounds = [mode.from_tensor(int32(9, 4)) for _ in range(2)]
        for softcap in (0.0, 2.0):
            operands = (query, key, value, *bounds, None, 0.25, True, 5, softcap)
            result = stock_attention.attention(AttentionOperands(*operands))
            assert result.shape == (2, 2, 3, D)


def test_lengths_read_no_more_of_memory_than_a_group_needs(monkeypatch):
    """Under a mask the queries of a group become rows of one head: nothing is repeated."""
    shapes = []
    stock = torch.ops.aten.scaled_dot_product_attention.default

    class Spy:
        @staticmethod
        def default(query, key, value, *rest, **options):
            shapes.append((query.shape, key.shape, key.data_ptr()))
            return stock(query, key, value, *rest, **options)

    class Aten:
        scaled_dot_product_attention = Spy

    monkeypatch.setattr(stock_attention, "_aten", Aten)
    query, key, value = torch.randn(2, 8, 3, D), torch.randn(2, 2, S, D), torch.randn(2, 2, S, D)
    call(query, key, value, lengths=int32(9, 4))
    assert shapes == [((2, 2, 12, D), (2, 2, S, D), key.data_ptr())]


def laid_out(order: str, label: str, share: float, *, heads: int = 2):
    """A simulated buffer [S, B, H, D] ("tokens") or [B, H, S, D] ("heads") as [B, H, S, D]."""
    nbytes = B * heads * S * D * 4
    tier = SimulatedTier(page_bytes=256)
    buffer = tier.allocate(nbytes, split=round(nbytes * share))
    buffer.label = label
    strides = {
        "tokens": (heads * D, D, B * heads * D, 1),
        "heads": (heads * S * D, S * D, D, 1),
    }[order]
    tensor = buffer.tensor(torch.float32, (B, heads, S, D), strides)
    tensor.copy_(torch.randn(B, heads, S, D))
    return buffer, tensor


def expected_read(buffer, tensor, spans) -> TierBytes:
    """Counted address by address."""
    read = set()
    for b, (first, last) in enumerate(spans):
        for h, t in itertools.product(range(tensor.shape[1]), range(max(first, 0), last)):
            at = tensor[b, h, t].data_ptr() - buffer.address
            read.update(range(at, at + D * 4))
    local = sum(byte < buffer.split for byte in read)
    return TierBytes(local, len(read) - local)


@pytest.mark.parametrize("order", ["tokens", "heads"])
@pytest.mark.parametrize("share", [0.0, 0.29, 0.5, 0.83, 1.0])
def test_only_visible_tokens_are_counted_by_tier(order, share):
    key_buffer, key = laid_out(order, "keys", share)
    value_buffer, value = laid_out(order, "values", 1 - share)
    lengths, starts = int32(24, 17, 0), int32(0, 3, 0)
    cases = [
        ({}, 4, [(0, 24)] * 3),
        ({"lengths": lengths}, 1, [(0, 24), (0, 17), (0, 0)]),
        ({"lengths": lengths, "starts": starts}, 4, [(0, 24), (3, 17), (0, 0)]),
        ({"lengths": lengths, "window": 6, "causal": True}, 1, [(18, 24), (11, 17), (0, 0)]),
        ({"lengths": lengths, "window": 6, "causal": True}, 4, [(15, 24), (8, 17), (0, 0)]),
        ({"lengths": lengths, "starts": int32(20, 0, 0), "window": 6}, 4,
         [(20, 24), (8, 17), (0, 0)]),
    ]  # fmt: skip
    for options, rows, spans in cases:
        counters.reset()
        query = torch.randn(B, 4, rows, D)
        result = call(query, key, value, **options)
        plain = call(query, key.clone(), value.clone(), **options)
        torch.testing.assert_close(result, plain, rtol=1e-6, atol=1e-6)
        reads = {read.tensor: read for read in counters.snapshot()}
        assert {(read.kind, read.calls) for read in reads.values()} == {("attention", 1)}
        assert reads["keys"].bytes == expected_read(key_buffer, key, spans), options
        assert reads["values"].bytes == expected_read(value_buffer, value, spans), options
        assert reads["keys"].bytes.total == sum(n - m for m, n in spans) * 2 * D * 4


def test_keys_and_values_of_one_buffer_are_one_call_and_repeated_heads_one_read():
    buffer, both = laid_out("tokens", "kv", 0.5, heads=4)
    key, value = both[:, :2], both[:, 2:]
    call(torch.randn(B, 4, 1, D), key, value, lengths=int32(24, 24, 24))
    (read,) = counters.snapshot()
    assert (read.calls, read.bytes) == (1, buffer.bytes_by_tier())
    counters.reset()
    repeated = key[:, :1].expand(B, 4, S, D)
    call(torch.randn(B, 4, 1, D), repeated, value[:, :1].expand(B, 4, S, D))
    (read,) = counters.snapshot()
    assert read.bytes.total == buffer.nbytes // 2, "half of the heads, each once"
    counters.reset()
    columns = both.transpose(2, 3)  # elements of a head are apart: all is taken as read
    call(torch.randn(B, 4, 1, S), columns, columns.clone())
    (read,) = counters.snapshot()
    assert read.bytes == buffer.bytes_by_tier()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.randn(B, 2, D)}, "takes \\[batch, heads, tokens, head_dim\\]"),
        ({"query": torch.randn(B, 4, 1, D + 1)}, "differ in head_dim"),
        ({"value": torch.randn(B, 2, S - 1, D)}, "key and value differ"),
        ({"query": torch.randn(B + 1, 4, 1, D)}, "4 sequences of queries on a cache of 3"),
        ({"query": torch.randn(B, 3, 1, D)}, "3 query heads are no multiple of 2"),
        ({"value": torch.randn(B, 2, S, D).half()}, "one floating dtype"),
        ({"lengths": torch.tensor([1, 2, 3])}, "lengths must be int32 of shape \\(3,\\)"),
        ({"starts": int32(1, 2)}, "starts must be int32 of shape \\(3,\\)"),
        ({"lengths": int32(25, 1, 1)}, "25 tokens in a cache that holds 24"),
        ({"mask": torch.ones(2, 1, 1, S) > 0}, "does not broadcast to \\(3, 4, 1, 24\\)"),
        ({"mask": torch.ones(B, 1, 1, S).int()}, "neither bool nor floating"),
        ({"window": -1}, "window=-1"),
        ({"softcap": -2.0}, "softcap=-2.0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(change, message):
    operands = {
        "query": torch.randn(B, 4, 1, D),
        "key": torch.randn(B, 2, S, D),
        "value": torch.randn(B, 2, S, D),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        call(**operands)
    if "25" not in message:  # values are not known to a trace
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=message):
            call(**operands)


def test_the_kernels_are_asked_in_order_and_what_all_decline_is_left_to_stock(monkeypatch):
    asked = []

    def kernel(name, answer):
        def run(call):
            asked.append((name, call))
            return answer

        return run

    _, key = laid_out("tokens", "keys", 0.5)
    query, value = torch.randn(B, 4, 1, D), torch.randn(B, 2, S, D)
    options = (None, None, None, 0.25, False, 0, 0.0)
    serve = ATTENTION_OPERATOR.kernel
    assert serve is not None
    for answers, expected in (
        ((None, query), query),
        ((value, query), value),
        ((None, None), None),
    ):
        asked.clear()
        runners = tuple(kernel(name, a) for name, a in zip("ab", answers, strict=True))
        monkeypatch.setattr(ops_attention, "_runners", lambda runners=runners: runners)
        assert serve(query, key, value, *options) is expected
        assert [name for name, _ in asked] == ["a", "b"][: len(asked)]
        assert all(made == AttentionOperands(query, key, value, *options) for _, made in asked)
        assert len(asked) == (1 if answers[0] is not None else 2)
        asked.clear()
        assert serve(query, key.clone(), value, *options) is None, "nothing is tiered"
        assert not asked


def test_a_kernel_that_is_not_installed_serves_nothing(monkeypatch, caplog):
    package = types.ModuleType("attention_kernels")
    launch = types.ModuleType("launch")
    launch.run = "run of launch"
    monkeypatch.setitem(sys.modules, "attention_kernels", package)
    monkeypatch.setitem(sys.modules, "attention_kernels.launch", launch)
    names = ("attention_kernels.missing", "attention_kernels.launch")
    monkeypatch.setattr(ops_attention, "KERNELS", names)
    ops_attention._runners.cache_clear()
    try:
        assert ops_attention._runners() == ("run of launch",)
        assert "attention_kernels.missing" in caplog.text
    finally:
        ops_attention._runners.cache_clear()
