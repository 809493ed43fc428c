"""The plan of staged attention: every row sees each of its tokens once, through parts that fit."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dak_inductor import hardware
from dak_inductor.lowering.attention import staged_plan, staged_timing
from dak_inductor.lowering.attention.staged_parts import Forward, Piece, PrefillProblem, pieces_of
from dak_inductor.lowering.attention.staged_timing import StagedTiming
from dak_inductor.lowering.slots import MOST_SLOTS

H200 = hardware.load("h200")
HOST, PEER = H200.link("cpu"), H200.link("cuda:1")
links = pytest.mark.parametrize("link", [HOST, PEER], ids=["host", "peer"])


def problem_of(queries: int, tokens: int, **more: object) -> PrefillProblem:
    """The attention of a Llama-3-8B layer over one sequence."""
    sizes: dict = {
        "batch": 1, "query_heads": 32, "key_heads": 8, "head_dim": 128, "value_dim": 128,
        "dtype": "bfloat16", "causal": True,
    }  # fmt: skip
    return PrefillProblem(queries=queries, tokens=tokens, **{**sizes, **more})


def seen_by(problem: PrefillProblem) -> np.ndarray:
    """[queries, tokens]: how often a row has to see a token."""
    token = np.arange(problem.tokens)[None, :]
    row = np.arange(problem.queries)[:, None]
    allowed = token <= problem.past + row if problem.causal else np.ones((1, 1), bool)
    return (allowed & (token >= problem.first) & (row >= 0)).astype(int)


def shown(piece: Piece, problem: PrefillProblem, seen: np.ndarray) -> None:
    rows, tokens = piece.rows, piece.stop - piece.start
    mask = np.ones((rows, tokens), int)
    if piece.causal:
        mask = np.tril(mask, tokens - rows)
    elif piece.forward == "triton":
        every = seen_by(problem)
        mask = every[piece.first_row : piece.last_row, piece.start : piece.stop]
    seen[piece.first_row : piece.last_row, piece.start : piece.stop] += mask


FORWARDS: list[tuple[Forward, ...]] = [
    ("cudnn",), ("flash",), ("cudnn", "flash"), ("cudnn", "triton"), ("flash", "triton"),
    ("cudnn", "flash", "triton"),
]  # fmt: skip


@st.composite
def planned(draw: st.DrawFn):
    queries = draw(st.integers(17, 700))
    past = draw(st.sampled_from([0, 1, 127, 128, 500, 2000]))
    causal = draw(st.booleans())
    problem = problem_of(
        queries, queries + past, causal=causal,
        batch=draw(st.sampled_from([1, 3])), key_heads=draw(st.sampled_from([1, 8, 32])),
        first=draw(st.sampled_from([0, 0, past // 2])),
    )  # fmt: skip
    local = draw(st.sampled_from([0, 1, problem.tokens // 3, problem.past, problem.tokens - 1]))
    forwards = draw(st.sampled_from(FORWARDS))
    few = draw(st.sampled_from([0, 130, 600, staged_plan.ROUNDED_TOKENS]))
    small = draw(st.sampled_from([2 << 20, staged_plan.RING_BYTES]))
    link = draw(st.sampled_from([HOST, PEER]))
    plans = {"RING_BYTES": small, "ROUNDED_TOKENS": few}
    rates = {}
    if draw(st.booleans()):  # as few calls of the Triton forward as may be
        plans |= {"PRECISION_COST": 1.0, "PRECISION_SECONDS": 0.0}
        rates = {"triton": 1e-4}
    with mock.patch.multiple(staged_plan, **plans), mock.patch.dict(staged_timing.RATE, rates):
        plan = staged_plan.choose(problem, local, H200, link, forwards)
    return problem, local, small, few if "triton" in forwards else 0, plan


@settings(deadline=None, max_examples=150)
@given(planned())
def test_each_row_sees_each_of_its_tokens_once(found) -> None:
    problem, local, ring_bytes, few, plan = found
    calls, rounded = np.zeros(problem.queries, int), np.zeros(problem.queries, int)
    seen = np.zeros((problem.queries, problem.tokens), int)
    for part in plan.parts:
        assert part.staged or part.stop <= max(local, problem.first), "remote tokens in place"
        for piece in part.pieces:
            assert part.start <= piece.start < piece.stop <= part.stop
            assert 0 <= piece.first_row < piece.last_row <= problem.queries
            square = piece.rows == piece.stop - piece.start
            assert square or not (piece.causal and piece.forward == "cudnn"), "another alignment"
            assert not piece.causal or piece.rows <= piece.stop - piece.start
            shown(piece, problem, seen)
            calls[piece.first_row : piece.last_row] += 1
            rounded[piece.first_row : piece.last_row] += piece.forward != "triton"
    assert (seen == seen_by(problem)).all()
    merged_from_rounded = (calls > 1) & (rounded > 0)
    assert not (merged_from_rounded & (seen_by(problem).sum(1) < few)).any()
    staged = sorted((part.start, part.stop) for part in plan.staged)
    ends = [local if staged and staged[0][0] else 0, *(stop for _, stop in staged)]
    if staged:
        assert ends[-1] == problem.tokens
        assert all(start == end for (start, _), end in zip(staged[1:], ends[1:], strict=False))
    assert len(plan.slots) <= MOST_SLOTS and bool(plan.slots) == bool(staged)
    for position, part in enumerate(plan.staged):
        assert part.tokens <= plan.slots[position % len(plan.slots)]
    whole = staged_plan.UNIT * problem.token_bytes
    assert sum(plan.slots) * problem.token_bytes <= max(ring_bytes, whole)


def test_triton_masks_by_positions_so_any_tokens_are_one_call() -> None:
    problem = problem_of(512, 2048)
    assert pieces_of(problem, 0, 2048, "triton") == (Piece(0, 512, 0, 2048, False, "triton"),)
    assert pieces_of(problem, 1700, 1800, "triton") == (
        Piece(1700 - 1536, 512, 1700, 1800, False, "triton"),
    )
    plan = staged_plan.choose(problem, 1000, H200, HOST, ("triton",))
    assert {piece.causal for piece in plan.pieces} == {False}


def test_everything_local_is_one_call_where_the_forward_knows_the_triangle() -> None:
    plan = staged_plan.choose(problem_of(4096, 4096), 4096, H200, HOST, ("cudnn", "flash"))
    assert plan.pieces == (Piece(0, 4096, 0, 4096, True, "cudnn"),) and plan.slots == ()
    plan = staged_plan.choose(problem_of(256, 9000), 9000, H200, HOST, ("flash",))
    assert plan.pieces == (Piece(0, 256, 0, 9000, True, "flash"),)
    plan = staged_plan.choose(problem_of(256, 9000), 9000, H200, HOST, ("cudnn",))
    assert [piece.causal for piece in plan.pieces] == [False, True]


def test_a_chunk_in_the_past_of_all_queries_has_no_mask() -> None:
    plan = staged_plan.choose(problem_of(2048, 65536), 0, H200, HOST, ("cudnn",))
    for part in plan.staged:
        if part.stop <= 65536 - 2048:
            assert part.pieces == (Piece(0, 2048, part.start, part.stop, False, "cudnn"),)


@links
@pytest.mark.parametrize("queries", [2048, 8192, 32768])
def test_the_estimate_is_near_the_bound(link, queries: int) -> None:
    """What the constants of the plan promise; `tests/gpu` measures what becomes of it."""
    for fraction in (0.0, 0.1, 0.5, 1.0):
        problem = problem_of(queries, queries)
        local = round((1 - fraction) * queries)
        plan = staged_plan.choose(problem, local, H200, link, ("cudnn", "flash"))
        remote = (queries - local) * problem.token_bytes
        pairs = queries * (queries + 1) / 2
        peak = 0.71 * H200.matmul_flops["bfloat16"]
        bound = max(remote / link.direct_bandwidth, 4 * 32 * 128 * pairs / peak)
        slack = 2.3 if queries == 2048 else 1.25
        assert 0.9 * bound < plan.seconds < slack * bound, fraction


def test_more_remote_tokens_never_take_less_time_by_much() -> None:
    before = 0.0
    for local in range(16384, -1, -2048):
        plan = staged_plan.choose(problem_of(2048, 16384), local, H200, HOST, ("cudnn", "flash"))
        assert plan.seconds > 0.95 * before
        before = plan.seconds


def test_a_long_context_is_planned_in_few_steps() -> None:
    """Candidates with hundreds of chunks would hold up the host."""
    problem = problem_of(2048, 700_000)
    sizes = list(staged_plan._chunks(problem, 0, staged_plan.RING_BYTES // problem.token_bytes))
    assert sum(map(len, sizes)) < 5000


def test_chunks_of_every_number_of_tokens_are_those_tokens() -> None:
    for tokens in (*range(17, 1200, 9), 4095, 20001):
        problem = problem_of(17, tokens)
        for local, room in ((0, 16384), (tokens // 3, 16384), (0, 700), (tokens - 1, 700)):
            for sizes in staged_plan._chunks(problem, local, room):
                assert sum(sizes) == tokens - local and min(sizes) > 0


def test_copies_never_wait_for_a_slot_where_the_ring_holds_them_all() -> None:
    for tokens in (2048, 8192, 16384):
        plan = staged_plan.choose(problem_of(tokens, tokens), 0, H200, HOST, ("cudnn",))
        assert len(plan.slots) == len(plan.staged)


def test_few_large_chunks_and_one_merge_where_all_is_remote() -> None:
    """8192 tokens: nine calls and two folds took 1.55 ms, of which merges 163 us."""
    plan = staged_plan.choose(problem_of(8192, 8192), 0, H200, HOST, ("cudnn",))
    assert len(plan.pieces) <= 6
    assert plan.seconds < 1.2e-3


def test_a_short_prompt_takes_few_calls() -> None:
    """2048 tokens, half remote: five calls and three merges took 193 us."""
    plan = staged_plan.choose(problem_of(2048, 2048), 1024, H200, HOST, ("cudnn",))
    assert len(plan.pieces) <= 3 and len(plan.staged) == 1


def test_pairs_that_the_triton_forward_computes_are_those_that_rows_see() -> None:
    for queries, past in ((7, 0), (5, 9)):
        problem = problem_of(queries, queries + past)
        timing = StagedTiming(problem, 0, H200, HOST)
        for start in range(problem.tokens):
            for stop in range(start + 1, problem.tokens + 1):
                (piece,) = pieces_of(problem, start, stop, "triton")
                rows = range(piece.first_row, piece.last_row)
                seen = sum(min(max(past + row + 1 - start, 0), stop - start) for row in rows)
                assert timing._pairs(piece) == max(1, seen)


def test_rows_of_few_tokens_alone_are_left_to_the_triton_forward() -> None:
    """All 8192 tokens remote: it costs the calls over the first 4096 rows, not over the others."""
    problem = problem_of(8192, 8192)
    plan = staged_plan.choose(problem, 0, H200, HOST, ("cudnn", "triton"))
    unrounded = [piece for piece in plan.pieces if piece.forward == "triton"]
    assert unrounded and all(piece.last_row <= staged_plan.ROUNDED_TOKENS for piece in unrounded)
    stock = staged_plan.choose(problem, 0, H200, HOST, ("cudnn",))
    portable = staged_plan.choose(problem, 0, H200, HOST, ("triton",))
    assert stock.seconds < plan.seconds < stock.seconds + 0.4 * (portable.seconds - stock.seconds)


def test_no_forward_but_those_given_is_planned() -> None:
    plan = staged_plan.choose(problem_of(512, 2048), 1000, H200, HOST, ("flash",))
    assert plan.staged and {piece.forward for piece in plan.pieces} == {"flash"}
