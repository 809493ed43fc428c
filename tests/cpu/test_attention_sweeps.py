"""The order in which readers of remote keys and values take their tiles, and the pages they touch.

Where tokens are outermost a unit's lie far apart. Readers that each walk along a unit of their own
touch a page for a few rows and come back to it once for every unit; in sweeps all of them are in
the same few pages at a time. What a miss costs is measured on the card; here pages are counted.
"""

from __future__ import annotations

import collections
import ctypes
import itertools
from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given, settings

from dak_inductor.lowering.attention.configuration import NO_SWEEP, choose
from dak_inductor.lowering.attention.problem import AttentionProblem

from .attention_division import (
    ROW_BYTES,
    TILE,
    Case,
    Found,
    cases,
    divide,
    division_library,
)

PAGE = 2 << 20
LINK = 51.2e9
KNOWN_PAGES = 128  # the last used: with 256 pages in all the H200 read at 0.97 of its rate


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return division_library(tmp_path_factory.mktemp("division"))


def whole_cache(batch: int, heads: int, tokens: int, *, token_major: bool = True) -> Case:
    """All remote, equal lengths, readers as with the window of the H200: 24 tiles."""
    problem = AttentionProblem(batch, heads, 1, 1, tokens, ROW_BYTES // 2, torch.bfloat16)
    case = Case(
        batch=batch, heads=heads, row_blocks=1, queries=1, tokens=tokens, visible=0, workers=264,
        slots=5, window=24 * TILE * ROW_BYTES, most_chunks=4, least_chunk=2, sweep=NO_SWEEP,
        finest_rows=1, remote_tile=90.0, remote_piece=800.0, token_major=token_major,
        offsets=(0, 0), splits=(0, 0), lengths=(tokens,) * batch, starts=(0,) * batch,
    )  # fmt: skip
    batch_bytes, head_bytes, token_bytes = case.strides()
    strides = (head_bytes, batch_bytes, token_bytes)
    return replace(case, sweep=choose(problem).sweep_tokens(problem, strides, strides))


def by_reader(tiles: list[Found]) -> dict[int, list[Found]]:
    found: dict[int, list[Found]] = collections.defaultdict(list)
    for tile in tiles:
        if tile.remote:
            found[tile.worker].append(tile)
    return found


def pages_of(case: Case, tile: Found, side: int) -> list[int]:
    batch, heads, token = case.strides()
    first = side << 50 | (tile.sequence * batch + tile.head * heads)
    places = range(first + tile.begin * token, first + tile.end * token, token)
    return sorted({place // PAGE for place in places})


def in_time(case: Case, readers: dict[int, list[Found]], seed: int) -> list[list[int]]:
    """Pages of each copy, in the order of time: keys and values of a tile one after the other.

    SMs get shares of the link that differ by up to 2%.
    """
    random = Random(seed)
    events = []
    for tiles in readers.values():
        pace = random.uniform(0.98, 1.02)
        for i, (tile, side) in enumerate(itertools.product(tiles, (0, 1))):
            events.append(((i + random.random()) * pace, pages_of(case, tile, side)))
    return [pages for _, pages in sorted(events)]


def pages_in_flight(copies: list[list[int]], count: int) -> float:
    """Distinct pages of `count` consecutive copies, the mean."""
    windows = [copies[i : i + count] for i in range(0, len(copies) - count, count)]
    return sum(len(set(itertools.chain(*window))) for window in windows) / len(windows)


def look_ups(copies: list[list[int]]) -> int:
    """Pages that are touched when KNOWN_PAGES others have been since the last time."""
    known: collections.OrderedDict[int, None] = collections.OrderedDict()
    misses = 0
    for page in itertools.chain(*copies):
        if page in known:
            known.move_to_end(page)
            continue
        misses += 1
        known[page] = None
        if len(known) > KNOWN_PAGES:
            known.popitem(last=False)
    return misses


@settings(max_examples=300, deadline=None)
@given(cases())
def test_what_a_worker_has_of_a_unit_is_taken_up_where_it_was_left(
    library: ctypes.CDLL, case: Case
) -> None:
    tiles: dict[tuple[int, int], list[Found]] = {}
    for tile in divide(library, case).tiles:
        tiles.setdefault((tile.worker, tile.slot), []).append(tile)
    for found in tiles.values():
        assert [tile.end for tile in found[:-1]] == [tile.begin for tile in found[1:]]
        pieces = [tile for tile in found if tile.opens_piece]
        assert [bool(piece.resumes) for piece in pieces] == [i > 0 for i in range(len(pieces))]
        assert [bool(piece.complete) for piece in pieces] == [
            i == len(pieces) - 1 for i in range(len(pieces))
        ]
        if case.sweep == NO_SWEEP or not found[0].remote:
            assert len(pieces) == 1


@settings(max_examples=300, deadline=None)
@given(cases())
def test_readers_sweep_over_the_tokens(library: ctypes.CDLL, case: Case) -> None:
    """Where remote tokens begin at the same one in all units, but for the one that is cut."""
    case = replace(case, token_major=True, visible=0, starts=(0,) * case.batch)
    if case.sweep == NO_SWEEP:
        return
    for tiles in by_reader(divide(library, case).tiles).values():
        highest = 0
        for tile in tiles:
            assert tile.begin > highest - case.sweep - 1
            highest = max(highest, tile.begin)


@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "times"),
    # 64, 128, 256 and 1024 KiB from token to token
    [(32, 8, 8192, 100), (64, 8, 4096, 300), (128, 8, 2048, 700), (128, 32, 512, 3000)],
)
def test_sweeps_look_up_few_pages(
    library: ctypes.CDLL, batch: int, heads: int, tokens: int, times: int
) -> None:
    case = whole_cache(batch, heads, tokens)
    assert case.sweep < NO_SWEEP
    found = {}
    for name, sweep in (("units", NO_SWEEP), ("sweeps", case.sweep)):
        each = replace(case, sweep=sweep)
        division = divide(library, each)
        assert division.remote_workers == 24
        copies = in_time(each, by_reader(division.tiles), seed=1)
        milliseconds = 2 * batch * heads * tokens * ROW_BYTES / LINK * 1e3
        found[name] = (pages_in_flight(copies, 24), look_ups(copies) / milliseconds)
    print({name: tuple(round(x, 1) for x in pair) for name, pair in found.items()})
    assert found["sweeps"][0] < found["units"][0] / 2
    # each page once: its bytes take the link 41 us
    least = LINK / PAGE / 1e3
    assert found["sweeps"][1] < 1.2 * least
    assert found["units"][1] > times * least


def test_caches_of_near_tokens_are_read_unit_by_unit() -> None:
    for batch, heads, token_major in ((1, 8, True), (16, 8, True), (128, 8, False)):
        assert whole_cache(batch, heads, 1024, token_major=token_major).sweep == NO_SWEEP
    assert whole_cache(32, 8, 1024).sweep == 2 * TILE
    assert whole_cache(128, 32, 1024).sweep == TILE
