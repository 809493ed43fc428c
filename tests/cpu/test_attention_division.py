"""How the attention kernel divides its work (kernels/attention), compiled for the CPU.

Whatever the lengths, starts, windows and splits: each token of each unit is read once, by a tile of
its kind, and all that several workers have of a unit is counted in. Where parts are cut never
depends on who claims them: claims are numbers of chunks.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dak_inductor.lowering.attention.launch import divisor

from .host_library import compile_for_host

TILE, ROW_BYTES = 64, 256
MOST_PIECES = 1 << 16

SOURCE = """
#include <algorithm>
#define __device__
#define __forceinline__ inline
#define __fdividef(a, b) (static_cast<float>(a) / static_cast<float>(b))
#define __umulhi(a, b) static_cast<unsigned>(static_cast<unsigned long long>(a) * (b) >> 32)
using std::max;
using std::min;
#include "attention/division.cuh"
#include "attention/slots.cuh"
#include "attention/task.cuh"
#include "attention/units.cuh"
#include "attention/walk.cuh"

using namespace dak;
using namespace dak::attention;

constexpr u32 tile = TILE, row_bytes = ROW_BYTES;

struct Found {
  u32 worker, remote, sequence, head, slot, slots, first_slot, last_slot;
  int begin, end;  // tokens
  u32 rows_begin, rows_end, tile_first;  // of the piece's first tile
  u64 local_bytes[2];
};

struct Sizes {
  u32 batch, heads, row_blocks, queries, tokens, visible, workers, slots, window;
  u32 most_chunks, least_chunk;
  float remote_tile, remote_piece;
  u32 blocks[2], grains[2];  // divisors
  u64 splits[2], offsets[2], batch_bytes, head_bytes, token_bytes;
};

extern "C" u32 quotient(u32 multiplier, u32 shift, u32 value) {
  return schedule::Divisor{multiplier, shift}.quotient(value);
}

// Bit 0: granted, bit 1: the last one.
extern "C" u32 claim(u32 chunks, u32 workers, u32 before) {
  const schedule::Claims claims{chunks, workers};
  return claims.granted(before) + 2 * claims.last(before);
}

// Ends of the parts of a line: of all runs' own ones, then of the chunks in the order of claims;
// `parts` receives their numbers and `part_of` what each position finds.
extern "C" u32 taper(u32 total, u32 workers, float share, u32 most, u32 least, u32* begins,
                     u32* ends, u32* parts, u32* part_of) {
  const schedule::TaperedLine line = schedule::TaperedLine::cut(total, workers, share, most, least);
  u32 count = 0;
  for (u32 run = 0; run < workers; ++run) {
    const schedule::Run own = line.own(run);
    if (own.begin == own.end) continue;
    begins[count] = own.begin;
    ends[count] = own.end;
    parts[count++] = line.own_part(run);
  }
  for (u32 i = 0; i < line.claimable(); ++i) {
    begins[count] = line.chunk(i).begin;
    ends[count] = line.chunk(i).end;
    parts[count++] = line.chunk_part(i);
  }
  for (u32 position = 0; position < total; ++position) part_of[position] = line.part_of(position);
  return count;
}

// Pieces of all workers, then of all chunks in the order of claims, as if each had a worker of its
// own; `totals` receives remote workers, quota, tiles of both lines, parts of both lines.
extern "C" u32 divide_work(const Sizes* sizes, const int* lengths, const int* starts, Found* found,
                           u32 most, u32* totals) {
  Arguments arguments{};
  for (u32 side = 0; side < 2; ++side) {
    arguments.caches[side] = {nullptr, sizes->offsets[side], sizes->batch_bytes, sizes->head_bytes,
                              sizes->token_bytes, {sizes->grains[0], sizes->grains[1]}};
  }
  arguments.batch = sizes->batch;
  arguments.heads = sizes->heads;
  arguments.row_blocks = sizes->row_blocks;
  arguments.blocks = {sizes->blocks[0], sizes->blocks[1]};
  arguments.queries = sizes->queries;
  arguments.tokens = sizes->tokens;
  arguments.visible = sizes->visible;
  arguments.most_chunks = sizes->most_chunks;
  arguments.least_chunk = sizes->least_chunk;
  arguments.remote_tile = sizes->remote_tile;
  arguments.remote_piece = sizes->remote_piece;
  static Sequence sequences[maximum_batch + 1];
  Division division{};
  division.splits[0] = sizes->splits[0];
  division.splits[1] = sizes->splits[1];
  const Units<tile, row_bytes> units(arguments, division, sequences);
  Count total{};
  for (u32 i = 0; i < sizes->batch; ++i) {
    sequences[i] = units.range(lengths[i], starts[i]);
    const Count count = units.count(i);
    for (u32 line = 0; line < 2; ++line) {
      sequences[i].before[line] = total.tiles[line];
      total.tiles[line] += count.tiles[line];
    }
    total.remote_units += count.remote_units;
    total.remote_tokens += count.remote_tokens;
    total.longest_remote = max(total.longest_remote, count.longest_remote);
  }
  sequences[sizes->batch] = {0, 0, {total.tiles[0], total.tiles[1]}};
  divide(division, arguments, total, sizes->workers, sizes->window, tile, row_bytes, sizes->slots);
  totals[0] = division.remote_workers;
  totals[1] = division.quota;
  totals[2] = total.tiles[0];
  totals[3] = total.tiles[1];
  totals[4] = division.lines[0].parts();
  totals[5] = division.lines[1].parts();
  u32 pieces = 0;
  const u32 chunks = division.lines[0].claimable();
  for (u32 worker = 0; worker < sizes->workers + chunks; ++worker) {
    Walk<tile, row_bytes> walk(units, Rest{});
    if (worker < sizes->workers) {
      walk.enter_first(division, worker, sizes->batch);
      // a worker that has nothing would never claim
      if (walk.done() && chunks > 0) return most + 3;
    } else {
      const u32 before = worker - sizes->workers;
      walk.enter(0, division.lines[0].chunk(before), division.lines[0].chunk_part(before),
                 sizes->batch);
    }
    for (Piece piece = walk.next(); piece.last > piece.first; piece = walk.next()) {
      const bool remote = piece.line == 1;
      const Task task = Task::of_piece(units, division, piece, sizes->batch);
      const Slots& slots = task.slots;
      for (u32 i = piece.first; i < piece.last; ++i) {
        if (pieces == most) return most + 1;
        const int first = units.first_token(piece.span, i, remote);
        if (first != task.first + static_cast<int>((i - piece.first) * tile)) return most + 4;
        const Rows rows = units.rows(piece.span, first);
        Found& tile_found = found[pieces++];
        tile_found = {worker, remote, piece.sequence, piece.head, task.slot, slots.total(),
                      slots.at(0), slots.at(slots.total() - 1),
                      max(first, piece.span.begin),
                      min(first + static_cast<int>(tile), piece.span.end),
                      rows.begin, rows.end, i == piece.first, {0, 0}};
        for (u32 side = 0; side < 2; ++side) {
          tile_found.local_bytes[side] =
              units.local_bytes(units.edge(side, piece.sequence, piece.head), tile_found.begin,
                                tile_found.end);
        }
        bool member = false;
        for (u32 j = 0; j < slots.total(); ++j) member = member || slots.at(j) == task.slot;
        if (!member) return most + 2;
      }
      if (task.tiles != piece.last - piece.first) return most + 5;
    }
    if (Task::of_piece(units, division, walk.next(), sizes->batch).tiles != 0) return most + 6;
  }
  return pieces;
}
"""


class Sizes(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint) for name in (
            "batch", "heads", "row_blocks", "queries", "tokens", "visible", "workers", "slots",
            "window", "most_chunks", "least_chunk",
        )),
        ("remote_tile", ctypes.c_float),
        ("remote_piece", ctypes.c_float),
        ("blocks", ctypes.c_uint * 2),
        ("grains", ctypes.c_uint * 2),
        ("splits", ctypes.c_uint64 * 2),
        ("offsets", ctypes.c_uint64 * 2),
        ("batch_bytes", ctypes.c_uint64),
        ("head_bytes", ctypes.c_uint64),
        ("token_bytes", ctypes.c_uint64),
    )  # fmt: skip


class Found(ctypes.Structure):
    """One tile."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in (
            "worker", "remote", "sequence", "head", "slot", "slots", "first_slot", "last_slot",
        )),
        ("begin", ctypes.c_int),
        ("end", ctypes.c_int),
        *((name, ctypes.c_uint) for name in ("rows_begin", "rows_end", "opens_piece")),
        ("local_bytes", ctypes.c_uint64 * 2),
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Sizes of a call, and where its caches are cut (bytes)."""

    batch: int
    heads: int
    row_blocks: int
    queries: int
    tokens: int
    visible: int
    workers: int
    slots: int
    window: int
    most_chunks: int
    least_chunk: int
    remote_tile: float
    remote_piece: float
    token_major: bool
    offsets: tuple[int, int]
    splits: tuple[int, int]
    lengths: tuple[int, ...]
    starts: tuple[int, ...]

    def strides(self) -> tuple[int, int, int]:
        """Bytes from one sequence, head and token to the next."""
        if self.token_major:
            return self.heads * ROW_BYTES, ROW_BYTES, self.batch * self.heads * ROW_BYTES
        return self.heads * self.tokens * ROW_BYTES, self.tokens * ROW_BYTES, ROW_BYTES

    def local_bytes(self, side: int, sequence: int, head: int, token: int) -> int:
        """Local bytes of one token of one head."""
        batch, heads, tokens = self.strides()
        start = self.offsets[side] + sequence * batch + head * heads + token * tokens
        return min(max(self.splits[side] - start, 0), ROW_BYTES)

    def seen(self, sequence: int) -> range:
        length = max(0, min(self.lengths[sequence], self.tokens))
        first = max(self.starts[sequence], 0)
        if self.visible:
            first = max(first, length - self.queries + 1 - self.visible)
        return range(min(first, length), length)


@dataclass(frozen=True)
class Division:
    tiles: list[Found]
    remote_workers: int
    quota: int
    local_tiles: int
    remote_tiles: int
    local_parts: int
    remote_parts: int


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The headers as a library for this machine."""
    sizes = (f"-DTILE={TILE}", f"-DROW_BYTES={ROW_BYTES}")
    return compile_for_host(SOURCE, tmp_path_factory.mktemp("division"), *sizes)


def divide(library: ctypes.CDLL, case: Case) -> Division:
    batch_bytes, head_bytes, token_bytes = case.strides()
    sizes = Sizes(
        case.batch, case.heads, case.row_blocks, case.queries, case.tokens, case.visible,
        case.workers, case.slots, case.window, case.most_chunks, case.least_chunk,
        case.remote_tile, case.remote_piece,
        (ctypes.c_uint * 2)(*divisor(case.row_blocks)),
        (ctypes.c_uint * 2)(*divisor(token_bytes // 16)),
        (ctypes.c_uint64 * 2)(*case.splits), (ctypes.c_uint64 * 2)(*case.offsets),
        batch_bytes, head_bytes, token_bytes,
    )  # fmt: skip
    found = (Found * MOST_PIECES)()
    totals = (ctypes.c_uint * 6)()
    lengths = (ctypes.c_int * case.batch)(*case.lengths)
    starts = (ctypes.c_int * case.batch)(*case.starts)
    count = library.divide_work(ctypes.byref(sizes), lengths, starts, found, MOST_PIECES, totals)
    assert count <= MOST_PIECES, {
        1: "too many tiles",
        2: "a slot that the last to arrive would not read",
        3: "a worker that never claims",
    }.get(count - MOST_PIECES, "a task that is not its piece")
    return Division(list(found[:count]), *totals)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch, heads = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    tokens = draw(st.integers(1, 700))
    whole = batch * heads * tokens * ROW_BYTES
    row = batch * heads * ROW_BYTES
    offsets = tuple(16 * draw(st.integers(0, 40)) for _ in range(2))

    def split(offset: int) -> int:
        kind = draw(st.sampled_from(("all", "none", "row", "any", "unlimited")))
        if kind == "row":
            return offset + draw(st.integers(0, tokens)) * row
        if kind == "any":
            return offset + 16 * draw(st.integers(0, whole // 16))
        return {"all": offset + whole, "none": 0, "unlimited": 2**64 - 1}[kind]

    lengths = draw(st.lists(st.integers(-1, tokens + 3), min_size=batch, max_size=batch))
    starts = draw(
        st.lists(st.one_of(st.just(0), st.integers(-2, tokens + 2)), min_size=batch, max_size=batch)
    )
    return Case(
        batch=batch, heads=heads, row_blocks=draw(st.sampled_from((1, 1, 2))),
        queries=draw(st.integers(1, 16)), tokens=tokens,
        visible=draw(st.one_of(st.just(0), st.integers(1, tokens + 5), st.just(2**31 - 1))),
        workers=draw(st.one_of(st.integers(2, 12), st.integers(2, 80))),
        slots=draw(st.integers(2, 8)), window=draw(st.integers(1, 600_000)),
        most_chunks=draw(st.integers(0, 4)), least_chunk=draw(st.integers(2, 5)),
        remote_tile=draw(st.sampled_from((0.0, 10.0, 90.0))),
        remote_piece=draw(st.sampled_from((0.0, 20.0, 800.0))),
        token_major=draw(st.booleans()), offsets=(offsets[0], offsets[1]),
        splits=(split(offsets[0]), split(offsets[1])),
        lengths=tuple(lengths), starts=tuple(starts),
    )  # fmt: skip


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
        assert tile.rows_begin % 8 == tile.rows_end % 8 == 0 and tile.rows_end <= TILE
        assert tokens <= copied < tokens + 16 and (tokens % 8 or copied == tokens or copied >= 8)


@settings(max_examples=300, deadline=None)
@given(cases())
def test_parts_of_a_unit_have_slots_of_their_own(library: ctypes.CDLL, case: Case) -> None:
    division = divide(library, case)
    pieces = [tile for tile in division.tiles if tile.opens_piece]
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


@given(st.integers(1, 2**31), st.integers(0, 2**32 - 1))
def test_divisors_divide(library: ctypes.CDLL, number: int, value: int) -> None:
    library.quotient.restype = ctypes.c_uint
    for each in (value, value // number * number, max(0, value // number * number - 1)):
        assert library.quotient(*divisor(number), each) == each // number
