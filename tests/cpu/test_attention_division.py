"""How the attention kernel divides its work (kernels/attention), compiled for the CPU.

Whatever the lengths, starts, windows and splits: each token of each unit is read once, by a tile of
its kind, and all that several workers have of a unit is counted in. Where parts are cut never
depends on who claims them: claims are numbers of chunks.
"""

from __future__ import annotations

import ctypes
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dak_inductor.lowering.attention.launch import divisor

from .attention_division import (
    NO_SWEEP,
    ROW_BYTES,
    TILE,
    Case,
    Found,
    cases,
    divide,
    division_library,
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return division_library(tmp_path_factory.mktemp("division"))


@settings(max_examples=300, deadline=None)
@given(cases())
def test_each_token_of_each_unit_is_read_once(library: ctypes.CDLL, case: Case) -> None:
    division = divide(library, case)
    read: dict[tuple[int, int], list[int]] = {}
    for tile in division.tiles:
        assert 0 <= tile.begin < tile.end <= tile.begin + TILE
        read.setdefault((tile.sequence, tile.head), []).extend(range(tile.begin, tile.end))
    for sequence in range(case.batch):
        for head in range(case.heads * case.row_blocks):
            tokens = read.pop((sequence, head), [])
            assert sorted(tokens) == list(case.seen(sequence))
    assert not read
    local = sum(not tile.remote for tile in division.tiles)
    assert (division.local_tiles, division.remote_tiles) == (local, len(division.tiles) - local)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_tiles_are_of_one_kind_and_counted_exactly(library: ctypes.CDLL, case: Case) -> None:
    for tile in divide(library, case).tiles:
        kv_head = tile.head // case.row_blocks
        each = [
            [case.local_bytes(side, tile.sequence, kv_head, token) for side in (0, 1)]
            for token in range(tile.begin, tile.end)
        ]
        all_local = [keys == values == ROW_BYTES for keys, values in each]
        assert not any(all_local) if tile.remote else all(all_local)
        assert [sum(token[side] for token in each) for side in (0, 1)] == list(tile.local_bytes)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_copies_cover_the_tokens_and_little_more(library: ctypes.CDLL, case: Case) -> None:
    for tile in divide(library, case).tiles:
        tokens = tile.end - tile.begin
        copied = tile.rows_end - tile.rows_begin
        assert tile.rows_begin % 8 == tile.rows_end % case.finest_rows == 0
        assert tile.rows_end <= TILE
        # local tiles are cut off at their begin, remote ones at their end
        assert tokens <= copied < tokens + (case.finest_rows if tile.remote else 8)


@settings(max_examples=300, deadline=None)
@given(cases())
def test_parts_of_a_unit_have_slots_of_their_own(library: ctypes.CDLL, case: Case) -> None:
    division = divide(library, case)
    pieces = [tile for tile in division.tiles if tile.opens_piece and not tile.resumes]
    taken = [tile.slot for tile in pieces]
    assert len(set(taken)) == len(taken)
    units = case.batch * case.heads * case.row_blocks
    # what lowering/attention/configuration.py has room for
    most = 2 * units + case.workers * (1 + case.most_chunks)
    assert all(slot < most for slot in taken)
    assert division.local_parts + division.remote_parts <= case.workers * (1 + case.most_chunks)
    parts: dict[tuple[int, int], list[Found]] = {}
    for tile in pieces:
        parts.setdefault((tile.sequence, tile.head), []).append(tile)
    for found in parts.values():
        assert {tile.slots for tile in found} == {len(found)}, "the last to arrive never comes"


@settings(max_examples=300, deadline=None)
@given(cases())
def test_remote_workers_keep_the_window(library: ctypes.CDLL, case: Case) -> None:
    division = divide(library, case)
    remote = {tile.worker for tile in division.tiles if tile.remote}
    assert remote == set(range(division.remote_workers))
    slots = [
        (tile.rows_end - tile.rows_begin) * ROW_BYTES for tile in division.tiles if tile.remote
    ]
    if slots:
        # one slot is let through however small the window is
        in_flight = max(division.quota, max(slots)) * division.remote_workers
        assert in_flight <= max(case.window, max(slots))


@settings(max_examples=300, deadline=None)
@given(cases())
def test_tiles_of_a_line_are_shared_evenly(library: ctypes.CDLL, case: Case) -> None:
    division = divide(library, case)
    tiles = [0] * (case.workers + 4 * case.workers)
    for tile in division.tiles:
        tiles[tile.worker] += 1
    readers = tiles[: division.remote_workers]
    others = tiles[division.remote_workers : case.workers]
    chunks = [count for count in tiles[case.workers :] if count > 0]
    if division.remote_tiles:
        assert max(readers) - min(readers) <= 1 and sum(readers) == division.remote_tiles
    if division.local_tiles:
        assert division.remote_workers <= max(1, case.workers // 2)
        assert max(others) - min(others) <= 1
        assert sum(others) + sum(chunks) == division.local_tiles
    # the long ones first, and none so short that its result costs more than it
    assert chunks == sorted(chunks, reverse=True)
    assert not chunks or min(chunks) >= case.least_chunk


@settings(max_examples=300, deadline=None)
@given(
    total=st.integers(0, 3000), workers=st.integers(1, 80), share=st.floats(0, 0.625),
    most=st.integers(0, 6), least=st.integers(2, 12),
)  # fmt: skip
def test_parts_of_a_line_cover_it_once(
    library: ctypes.CDLL, total: int, workers: int, share: float, most: int, least: int
) -> None:
    room = workers * 5
    begins, ends, parts = ((ctypes.c_uint * room)() for _ in range(3))
    part_of = (ctypes.c_uint * max(1, total))()
    count = library.taper(
        total, workers, ctypes.c_float(share), most, least, begins, ends, parts, part_of
    )
    found = sorted(zip(begins[:count], ends[:count], parts[:count], strict=True))
    assert [part for _, _, part in found] == list(range(count)), "numbers follow the line"
    at = 0
    for begin, end, part in found:
        assert begin == at < end
        assert set(part_of[begin:end]) == {part}
        at = end
    assert at == total


@settings(max_examples=200, deadline=None)
@given(chunks=st.integers(1, 60), workers=st.integers(1, 30), random=st.randoms())
def test_claims_give_each_chunk_once_and_leave_no_count(
    library: ctypes.CDLL, chunks: int, workers: int, random: Random
) -> None:
    count = 0
    asked: dict[int, int] = {}  # worker: claims before its own, not yet acted upon
    taken: list[int] = []
    at_work = set(range(workers))
    reset = False
    while at_work:
        worker = random.choice(sorted(at_work))
        if worker not in asked:
            assert not reset, "a claim after the count was set back"
            asked[worker] = count
            count += 1
            continue
        before = asked.pop(worker)
        answer = library.claim(chunks, workers, before)
        if answer & 1:
            taken.append(before)
            continue
        at_work.remove(worker)
        if answer & 2:
            reset, count = True, 0
    assert sorted(taken) == list(range(chunks))
    assert reset and count == 0


@settings(deadline=None)
@given(local=st.integers(0, 1320), remote=st.integers(0, 300), most=st.sampled_from((16, 48)))
def test_each_result_is_added_up_once(
    library: ctypes.CDLL, local: int, remote: int, most: int
) -> None:
    total = local + remote
    members = (ctypes.c_uint * 8)()
    lines = (ctypes.c_uint * 2)(local, remote)
    arrivals: dict[int, list[int]] = {}
    for index in range(total):
        grouped = library.group(lines, index, most, members)
        first, step, count, everything = members[:4]
        assert step == 1 and bool(everything) == (not grouped) == (total <= most)
        assert first <= index < first + count <= total
        arrivals.setdefault(first, []).append(index)
        assert len(arrivals[first]) <= count
        if grouped:
            leaders = range(0, total, members[5])
            assert first in leaders and count <= members[5]
            assert tuple(members[4:]) == (0, members[5], len(leaders), 1)
            assert max(members[5], len(leaders)) <= 4 * total**0.5
    for first, found in arrivals.items():
        library.group(lines, first, most, members)
        assert len(found) == members[2], "who comes last knows"


@given(st.integers(1, 2**31), st.integers(0, 2**32 - 1))
def test_divisors_divide(library: ctypes.CDLL, number: int, value: int) -> None:
    library.quotient.restype = ctypes.c_uint
    for each in (value, value // number * number, max(0, value // number * number - 1)):
        assert library.quotient(*divisor(number), each) == each // number


def test_a_link_with_time_to_spare_has_fewer_readers(library: ctypes.CDLL) -> None:
    """32 sequences of 8192 tokens on the H200, at costs of NVLink and of host memory."""

    def readers(remote: int, window: int, remote_tile: float) -> int:
        batch, heads, tokens = 32, 8, 8192
        split = (tokens - remote) * batch * heads * ROW_BYTES
        case = Case(
            batch=batch, heads=heads, row_blocks=1, queries=1, tokens=tokens, visible=0,
            workers=264, slots=5, window=window, most_chunks=4, least_chunk=2, sweep=NO_SWEEP,
            finest_rows=1, remote_tile=remote_tile, remote_piece=1160.0, token_major=True,
            offsets=(0, 0), splits=(split, split), lengths=(tokens,) * batch, starts=(0,) * batch,
        )  # fmt: skip
        return divide(library, case).remote_workers

    few, many = (readers(remote, 2 << 20, 12.7) for remote in (82, 820))
    assert many == 32  # with four slots of 16 KiB each they fill the window
    # pieces take 8 us each, and 256 of them the time of 10 readers; a few more for the bytes
    assert 14 <= few <= 20
    assert readers(82, 400 << 10, 92.7) == readers(820, 400 << 10, 92.7) == 25
