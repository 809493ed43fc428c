"""Staged attention on the simulated tier: values, the merge, the order of copies, counts, notes.

Stock forwards exist on CUDA only; a stand-in with their conventions takes their place.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial as bind

import pytest
import torch
from torch import Tensor

from dak_inductor import hardware
from dak_inductor.cuda_runtime.simulated import SimulatedTier
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.lowering import counters, staging
from dak_inductor.lowering.attention import (
    host_lengths,
    partial_results,
    staged,
    staged_parts,
    staged_plan,
    staged_timing,
    stock_forward,
)
from dak_inductor.lowering.attention.operands import AttentionOperands
from dak_inductor.lowering.attention.partial_results import PartialResult, PartialResults
from dak_inductor.lowering.attention.staged_parts import Piece, PrefillProblem
from dak_inductor.lowering.attention.stored_tokens import rectangles, stored_tokens
from dak_inductor.lowering.queues import Queues

from .fake_queues import Scheduler

H200 = hardware.load("h200")
NAN = float("nan")


@pytest.fixture(autouse=True)
def _no_counts() -> Iterator[None]:
    counters.reset()
    yield
    counters.reset()


@pytest.fixture
def small_ring(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rings and chunks so small that few tokens take many turns."""
    monkeypatch.setattr(staged_plan, "RING_BYTES", 24 * 1024)
    monkeypatch.setattr(staged_plan, "UNIT", 8)
    staged._plan.cache_clear()
    yield
    staged._plan.cache_clear()


def scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    repeated = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return query.double() @ repeated.double().transpose(-1, -2) * scale


def attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """[B, Hq, Q, Dv] in float64; `seen` broadcasts to [B, Hq, Q, S]."""
    masked = scores(query, key, scale).masked_fill(~seen, -torch.inf)
    repeated = value.repeat_interleave(query.shape[1] // value.shape[1], 1).double()
    return torch.softmax(masked, -1).nan_to_num(0.0) @ repeated


def bottom_right(queries: int, tokens: int) -> Tensor:
    return torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)


def stand_in(
    forward: str, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The conventions of `stock_forward.attend`: what cuDNN refuses, and where rows see nothing."""
    rows, tokens = query.shape[2], key.shape[2]
    seen = torch.ones(rows, tokens, dtype=torch.bool)
    if causal:
        assert forward == "flash" or rows == tokens, "cuDNN aligns at the first token"
        seen = bottom_right(rows, tokens)
    lse = torch.logsumexp(scores(query, key, scale).masked_fill(~seen, -torch.inf), -1)
    out = attention(query, key, value, seen, scale)
    empty = lse == -torch.inf
    out[empty] = NAN if forward == "cudnn" else 0.0
    lse[empty] = torch.inf
    return out.transpose(1, 2).contiguous().to(query.dtype), lse.float().contiguous()


@pytest.fixture(params=["cudnn", "flash"])
def forward(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(stock_forward, "available", lambda query, value_dim: (request.param,))
    monkeypatch.setattr(stock_forward, "attend", stand_in)
    return str(request.param)


def tiered(values: Tensor, split: int, *, token_major: bool = True) -> tuple[TieredBuffer, Tensor]:
    """[B, H, S, D] in a simulated buffer of which `split` bytes are local."""
    batch, heads, tokens, width = values.shape
    buffer = SimulatedTier(page_bytes=256).allocate(values.nbytes, split=split)
    if token_major:
        shape = (tokens, batch, heads, width)
        tensor = buffer.tensor(values.dtype, shape).permute(1, 2, 0, 3)
    else:
        tensor = buffer.tensor(values.dtype, tuple(values.shape))
    tensor.copy_(values)
    return buffer, tensor


@dataclass(frozen=True)
class Call:
    """A query and a cache with its two buffers; what `staged.run` is asked."""

    query: Tensor
    key: Tensor
    value: Tensor
    buffers: tuple[TieredBuffer, TieredBuffer]

    def run(self, **options: object) -> Tensor | None:
        asked: dict = {
            "lengths": None, "starts": None, "mask": None, "scale": 0.3, "causal": True,
            "window": 0, "softcap": 0.0,
        }  # fmt: skip
        asked |= options
        return staged.run(AttentionOperands(self.query, self.key, self.value, **asked))

    def exact(self, *, tokens: int | None = None, causal: bool = True) -> Tensor:
        tokens = tokens or self.key.shape[2]
        queries = self.query.shape[2]
        seen = bottom_right(queries, tokens) if causal else torch.ones(1, 1, dtype=torch.bool)
        return attention(self.query, self.key[:, :, :tokens], self.value[:, :, :tokens], seen, 0.3)


def call_of(
    queries: int,
    tokens: int,
    splits: tuple[float, float],
    *,
    batch: int = 2,
    heads: tuple[int, int] = (4, 2),
    widths: tuple[int, int] = (16, 16),
    token_major: bool = True,
) -> Call:
    query = torch.randn(batch, queries, heads[0], widths[0]).transpose(1, 2)
    stored = []
    for width, share in zip(widths, splits, strict=True):
        values = torch.randn(batch, heads[1], tokens, width)
        split = int(values.nbytes * share) // 4 * 4
        stored.append(tiered(values, split, token_major=token_major))
    (key_buffer, key), (value_buffer, value) = stored
    key_buffer.label, value_buffer.label = "keys", "values"
    return Call(query, key, value, (key_buffer, value_buffer))


def assert_close(result: Tensor | None, exact: Tensor) -> None:
    assert result is not None
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5)


# --- values and counts ---


@pytest.mark.parametrize("token_major", [True, False], ids=["token-major", "heads"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_every_split_gives_attention_and_counts_each_byte_once(
    small_ring: None, forward: str, causal: bool, token_major: bool
) -> None:
    for queries, tokens in ((40, 40), (17, 200), (100, 130)):
        for splits in ((0.0, 0.0), (1.0, 1.0), (0.5, 0.5), (0.31, 0.77), (1.0, 0.0)):
            call = call_of(queries, tokens, splits, token_major=token_major)
            counters.reset()
            result = call.run(causal=causal)
            assert_close(result, call.exact(causal=causal))
            assert result is not None and result.transpose(1, 2).is_contiguous()
            reads = counters.snapshot()
            assert [read.calls for read in reads] == [1, 1]
            assert [read.bytes for read in reads] == [b.bytes_by_tier() for b in call.buffers]


def test_rows_of_few_tokens_by_another_forward_than_the_rest(
    small_ring: None, forward: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unrounded parts for some rows, stock ones for the rows before and behind them."""
    used: set[str] = set()

    def masked(
        work: staged.StagedAttention, rows: Tensor, key: Tensor, value: Tensor, piece: Piece
    ) -> tuple[Tensor, Tensor]:
        used.add("triton")
        past = tokens - queries
        token = torch.arange(piece.start, piece.stop)[None, :]
        row = torch.arange(piece.first_row, piece.last_row)[:, None]
        seen = token <= past + row
        found = scores(rows, key, 0.3).masked_fill(~seen, -torch.inf)
        out = attention(rows, key, value, seen, 0.3).transpose(1, 2).contiguous()
        return out.float(), torch.logsumexp(found, -1).float()

    def stock(*call: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        used.add(forward)
        return stand_in(*call, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(staged, "_forwards", lambda *_: (forward, "triton"))
    monkeypatch.setattr(staged.StagedAttention, "_masked", masked)
    monkeypatch.setattr(stock_forward, "attend", stock)
    monkeypatch.setattr(staged_parts, "ROWS", 8)
    monkeypatch.setattr(staged_plan, "PRECISION_SECONDS", 0.0)
    monkeypatch.setitem(staged_timing.RATE, "triton", 1e-4)  # as few of its calls as may be
    monkeypatch.setattr(staged_plan, "ROUNDED_TOKENS", 60)
    for queries, tokens in ((100, 100), (90, 130)):
        for splits in ((0.0, 0.0), (0.2, 0.2), (0.31, 0.77)):
            used.clear()
            call = call_of(queries, tokens, splits)
            assert_close(call.run(), call.exact())
            assert used == {forward, "triton"}


def test_values_may_have_heads_of_another_size(small_ring: None, forward: str) -> None:
    call = call_of(33, 90, (0.4, 0.6), widths=(16, 24), heads=(6, 2), batch=1)
    assert_close(call.run(), call.exact())


def test_one_of_keys_and_values_may_lie_in_no_buffer(small_ring: None, forward: str) -> None:
    call = call_of(33, 90, (0.4, 0.6))
    plain = call.value.clone()
    result = Call(call.query, call.key, plain, call.buffers).run()
    assert_close(result, call.exact())
    (read,) = counters.snapshot()
    assert read.tensor == "keys"
    assert Call(call.query, call.key.clone(), plain, call.buffers).run() is None


def test_a_noted_length_ends_the_read(small_ring: None, forward: str) -> None:
    call = call_of(20, 160, (0.2, 0.2))
    lengths = torch.full((2,), 100, dtype=torch.int32)
    assert call.run(lengths=lengths) is None, "its mask is not known on the host"
    host_lengths.note_length(call.buffers[0], 100, exact=True)
    assert_close(call.run(lengths=lengths), call.exact(tokens=100))
    token_bytes = call.key[:, :, 0].numel() * 4
    assert [read.bytes.total for read in counters.snapshot()] == [100 * token_bytes] * 2
    starts = torch.zeros(2, dtype=torch.int32)
    assert call.run(lengths=lengths, starts=starts) is None, "they may be padded"
    zeros = starts.data_ptr()
    host_lengths.note_length(call.buffers[0], 100, exact=True, zero_starts=zeros)
    assert_close(call.run(lengths=lengths, starts=starts), call.exact(tokens=100))
    assert call.run(lengths=lengths, starts=starts + 1) is None, "other starts than those noted"
    host_lengths.note_length(call.buffers[0], 100, exact=False)
    assert call.run(lengths=lengths) is None
    host_lengths.note_length(call.buffers[0], 161, exact=True)
    assert call.run(lengths=lengths) is None, "more tokens than the keys have"
    host_lengths.forget_length(call.buffers[0])
    assert host_lengths.length_of(call.buffers[0]) is None
    assert host_lengths.length_of(None) is None


def test_notes_die_with_their_buffer() -> None:
    call = call_of(20, 40, (0.2, 0.2))
    before = len(host_lengths._lengths)
    host_lengths.note_length(call.buffers[0], 40)
    assert len(host_lengths._lengths) == before + 1
    assert host_lengths.length_of(call.buffers[0]) == host_lengths.HostLength(40)
    del call
    gc.collect()
    assert len(host_lengths._lengths) == before


def test_what_positions_do_not_say_is_left_to_the_stock_composition(
    small_ring: None, forward: str
) -> None:
    call = call_of(20, 60, (0.2, 0.2))
    assert call.run(mask=torch.ones(20, 60, dtype=torch.bool)) is None
    assert call.run(softcap=30.0) is None
    assert call.run(window=16) is None
    assert call.run(starts=torch.zeros(2, dtype=torch.int32)) is None
    assert not counters.snapshot()
    assert_close(call.run(window=60), call.exact())  # wider than any row looks back
    for query in (call.query.half(), call.query[:1], call.query[..., :8], call.query[:, :3]):
        assert Call(query, call.key, call.value, call.buffers).run() is None
    assert Call(call.query[:, :, :0], call.key, call.value, call.buffers).run() is None
    assert Call(call.query[0], call.key, call.value, call.buffers).run() is None
    odd = call.key.transpose(2, 3).contiguous().transpose(2, 3)
    with_value = Call(call.query, odd, call.value, call.buffers)
    assert with_value.run() is None


def test_queries_before_the_first_token_have_no_stock_forward(forward: str) -> None:
    call = call_of(50, 40, (0.5, 0.5))
    assert call.run() is None
    assert_close(call.run(causal=False), call.exact(causal=False))


# --- the merge ---


def partials_of(
    query: Tensor, key: Tensor, value: Tensor, cuts: list[int], rows: list[int]
) -> list[PartialResult]:
    """Results over tokens [cuts[i], cuts[i + 1]), of the rows from rows[i] on."""
    found = []
    for start, stop, first in zip(cuts, cuts[1:], rows, strict=False):
        out, lse = stand_in(
            "flash", query[:, :, first:], key[:, :, start:stop], value[:, :, start:stop],
            causal=False, scale=0.3,
        )  # fmt: skip
        found.append(PartialResult(first, out, lse))
    return found


def test_no_merge_writes_to_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The merging kernel has no barrier where all results are fp32: a warp would read what another
    has written."""
    monkeypatch.setattr(partial_results, "MOST_PENDING", 3)
    merged: list[int] = []

    def merge(
        partials: list[PartialResult], start: int, stop: int, out: Tensor, lse: Tensor | None
    ) -> None:
        written = {out.data_ptr()} | ({lse.data_ptr()} if lse is not None else set())
        assert not written & {t.data_ptr() for p in partials for t in (p.out, p.lse)}
        merged.append(len(partials))
        real(partials, start, stop, out, lse)

    real = partial_results.merge
    monkeypatch.setattr(partial_results, "merge", merge)
    results = PartialResults(5, torch.float32)
    shares = torch.rand(9)
    for share in shares:
        out, lse = torch.full((1, 5, 2, 4), float(share)), torch.full((1, 2, 5), float(share))
        results.add(PartialResult(0, out, lse))
    weights = torch.softmax(shares, 0)
    torch.testing.assert_close(
        results.result(), torch.full((1, 2, 5, 4), float((weights * shares).sum()))
    )
    assert len(merged) > 3 and max(merged) == 3


@pytest.mark.parametrize("pending", [2, 3, 6])
@pytest.mark.parametrize("held", [0, 1 << 30])
def test_the_merge_is_attention_over_all_tokens(
    monkeypatch: pytest.MonkeyPatch, pending: int, held: int
) -> None:
    monkeypatch.setattr(partial_results, "MOST_PENDING", pending)
    monkeypatch.setattr(partial_results, "PENDING_BYTES", held)
    query, key, value = (torch.randn(2, h, n, 8) for h, n in ((4, 20), (2, 90), (2, 90)))
    query[:, :, :5] *= 40  # scores of very different size
    cuts, rows = [0, 7, 8, 30, 31, 60, 75, 88, 90], [0, 0, 3, 3, 10, 0, 19, 5]
    seen = torch.zeros(20, 90, dtype=torch.bool)
    results = PartialResults(20, torch.float32)
    for partial, start, stop in zip(
        partials_of(query, key, value, cuts, rows), cuts, cuts[1:], strict=False
    ):
        seen[partial.first_row :, start:stop] = True
        results.add(partial)
    assert_close(results.result(), attention(query, key, value, seen, 0.3))


def test_rows_that_saw_nothing_are_zero_whatever_their_partial_results_hold() -> None:
    out = torch.full((1, 6, 2, 4), NAN)
    lse = torch.full((1, 2, 6), torch.inf)
    results = PartialResults(8, torch.float32)
    results.add(PartialResult(1, out, lse))
    other = torch.ones(1, 4, 2, 4)
    results.add(PartialResult(3, other, torch.zeros(1, 2, 4)))
    merged = results.result()
    assert merged[:, :, :3].eq(0).all() and merged[:, :, 7].eq(0).all()
    assert merged[:, :, 3:7].eq(1).all()
    for empty in (-torch.inf, NAN):
        lse.fill_(empty)
        again = PartialResults(8, torch.float32)
        for partial in (PartialResult(1, out, lse), PartialResult(3, other, torch.zeros(1, 2, 4))):
            again.add(partial)
        assert torch.equal(again.result(), merged)


def test_half_precision_parts_lose_no_more_than_a_rounding() -> None:
    query, key, value = (
        torch.randn(1, h, n, 64, dtype=torch.bfloat16) for h, n in ((4, 32), (4, 512), (4, 512))
    )
    results = PartialResults(32, torch.bfloat16)
    for partial in partials_of(query, key, value, list(range(0, 513, 64)), [0] * 8):
        results.add(partial)
    every = torch.ones(1, 1, dtype=torch.bool)
    exact = attention(query, key, value, every, 0.3)
    rounded = exact.to(torch.bfloat16).double()
    error = (results.result().double() - exact).square().mean()
    assert error < 4 * (rounded - exact).square().mean()


def test_a_single_result_is_handed_on_as_it_is() -> None:
    out = torch.randn(2, 5, 3, 4)
    results = PartialResults(5, torch.float32)
    results.add(PartialResult(0, out, torch.zeros(2, 3, 5)))
    assert results.result().data_ptr() == out.data_ptr()


# --- copies ---


def test_rectangles_mix_no_local_and_remote_bytes() -> None:
    for rows in (1, 2, 5):
        for pitch, columns in ((7, 7), (9, 4)):
            for local in range(-3, rows * pitch + 5):
                covered = torch.zeros(rows, columns, dtype=torch.int)
                is_local = (
                    torch.arange(rows)[:, None] * pitch + torch.arange(columns)[None, :] < local
                )
                for row, column in rectangles(rows, pitch, columns, local):
                    covered[row, column] += 1
                    inside = is_local[row, column]
                    assert inside.numel() and (inside.all() or not inside.any())
                assert covered.eq(1).all()


def test_tokens_are_placed_by_their_buffer() -> None:
    values = torch.randn(2, 3, 40, 8)
    row = 2 * 3 * 8 * 4
    buffer, tensor = tiered(values, 12 * row + 32)
    assert stored_tokens(tensor, buffer).local_tokens() == 12  # type: ignore[union-attr]
    assert stored_tokens(tensor[:, :, 10:30], buffer).local_tokens() == 2  # type: ignore[union-attr]
    assert stored_tokens(tensor[:, :, :5], buffer).local_tokens() == 5  # type: ignore[union-attr]
    assert stored_tokens(tensor[:, :, 20:], buffer).local_tokens() == 0  # type: ignore[union-attr]
    assert stored_tokens(tensor, None).local_tokens() == 40  # type: ignore[union-attr]
    buffer, tensor = tiered(values, values.nbytes - 4, token_major=False)
    assert stored_tokens(tensor, buffer).local_tokens() == 0  # type: ignore[union-attr]
    assert stored_tokens(tensor[:1], buffer).local_tokens() == 40  # type: ignore[union-attr]
    assert stored_tokens(tensor[:, 1:], buffer) is None
    assert stored_tokens(tensor.transpose(2, 3), buffer) is None
    slot = torch.full((4 * values.numel(),), NAN)
    for major in (True, False):
        buffer, tensor = tiered(values, 13 * row + 100, token_major=major)
        stored = stored_tokens(tensor, buffer)
        assert stored is not None
        for start, stop in ((0, 40), (12, 15), (13, 14), (39, 40)):
            slot.fill_(NAN)
            stored.copy(slot, start, stop, 0)
            assert torch.equal(stored.held(slot, stop - start), values[:, :, start:stop])


# --- the order ---


def staged_result(seed: int, *, without: str = "") -> tuple[Tensor, Tensor]:
    """A call whose queues run in an order of `seed`, and the exact result."""
    call = call_of(60, 200, (0.25, 0.25))
    stored = [
        stored_tokens(tensor, buffer)
        for tensor, buffer in zip((call.key, call.value), call.buffers, strict=True)
    ]
    keys, values = stored
    assert keys is not None and values is not None
    problem = PrefillProblem(2, 4, 2, 60, 200, 16, 16, "float32", True)
    pick = random.Random(seed)
    link = pick.choice([H200.link("cpu"), H200.link("cuda:1")])
    plan = staged_plan.choose(problem, 50, H200, link, ("flash",))
    assert len(plan.staged) > len(plan.slots) > 0
    slots = tuple(
        tuple(torch.full((tokens * each.elements,), NAN) for each in (keys, values))
        for tokens in plan.slots
    )
    scheduler = Scheduler(pick)
    main, side = scheduler.queue(), scheduler.queue()
    if without == "side":
        side.wait = lambda mark: None  # type: ignore[method-assign]
    elif without == "main":
        main.wait = lambda mark: None  # type: ignore[method-assign]
    results = PartialResults(60, torch.float32)
    asked = AttentionOperands(call.query, call.key, call.value, None, None, None, 0.3, True, 0, 0.0)
    work = staged.StagedAttention(call.query, keys, values, asked, results, call.query.dtype)
    counted: list[bool] = []
    count = bind(counted.append, True)
    copy_bound = pick.choice([False, True])
    queues = Queues(main, side)
    staging.issue(plan.parts, work, slots, queues, count, copy_bound=copy_bound)  # type: ignore[misc]
    ended: list[bool] = []
    main.run(lambda: ended.append(not side.entries and counted == [True]))
    scheduler.drain()
    assert without or ended == [True], "the main queue went on before the last copy"
    return results.result(), call.exact()


def test_any_interleaving_gives_attention(
    small_ring: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stock_forward, "attend", stand_in)
    for seed in range(25):
        result, exact = staged_result(seed)
        assert_close(result, exact)


@pytest.mark.parametrize("without", ["side", "main"])
def test_a_lost_wait_is_found(
    small_ring: None, monkeypatch: pytest.MonkeyPatch, without: str
) -> None:
    """The interleavings above can fail: without waits on one side, values are wrong."""
    monkeypatch.setattr(stock_forward, "attend", stand_in)
    wrong = 0
    for seed in range(15):
        result, exact = staged_result(seed, without=without)
        wrong += not torch.allclose(result.double(), exact, rtol=1e-4, atol=1e-4)
    assert wrong
