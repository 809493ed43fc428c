"""How the attention kernel divides its work (kernels/attention), compiled for the CPU.

Whatever the lengths, starts, windows and splits: each token of each unit is read once, by a tile of
its kind, and all that several workers have of a unit is counted in.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dak_inductor.cuda_runtime.nvrtc import KERNELS

TILE, ROW_BYTES = 64, 256
MOST_PIECES = 1 << 16

SOURCE = """
#include <algorithm>
#define __device__
#define __forceinline__ inline
#define __fdividef(a, b) ((a) / (b))
using std::max;
using std::min;
#include "attention/slots.cuh"
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
  u64 splits[2], offsets[2], batch_bytes, head_bytes, token_bytes;
};

// Pieces of all workers; `totals` receives remote workers, quota, tiles of both lines.
extern "C" u32 divide_work(const Sizes* sizes, const int* lengths, const int* starts, Found* found,
                           u32 most, u32* totals) {
  Arguments arguments{};
  for (u32 side = 0; side < 2; ++side) {
    arguments.caches[side] = {nullptr, sizes->offsets[side], sizes->batch_bytes, sizes->head_bytes,
                              sizes->token_bytes};
  }
  arguments.batch = sizes->batch;
  arguments.heads = sizes->heads;
  arguments.row_blocks = sizes->row_blocks;
  arguments.queries = sizes->queries;
  arguments.tokens = sizes->tokens;
  arguments.visible = sizes->visible;
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
    total.remote_tokens += count.remote_tokens;
    total.longest_remote = max(total.longest_remote, count.longest_remote);
  }
  sequences[sizes->batch] = {0, 0, {total.tiles[0], total.tiles[1]}};
  divide(division, total, sizes->workers, sizes->window, tile, row_bytes, sizes->slots);
  totals[0] = division.remote_workers;
  totals[1] = division.quota;
  totals[2] = total.tiles[0];
  totals[3] = total.tiles[1];
  u32 pieces = 0;
  for (u32 worker = 0; worker < sizes->workers; ++worker) {
    Walk<tile, row_bytes> walk(units, division, worker);
    const bool remote = walk.remote();
    walk.seek(sizes->batch);
    Piece piece;
    while (walk.next(piece)) {
      const int boundary = units.boundary(piece.sequence, piece.head);
      const u32 tiles[2] = {units.span(piece.sequence, boundary, false).tiles,
                            units.span(piece.sequence, boundary, true).tiles};
      const u32 unit = piece.sequence * units.heads() + piece.head;
      const u32 count = sizes->batch * units.heads();
      const Slots slots = Slots::of_unit(division, units.place(piece.sequence, piece.head), tiles,
                                         unit, count);
      const u32 slot = Slots::line_begin(division, remote, count) + unit + piece.run;
      for (u32 i = piece.first; i < piece.last; ++i) {
        if (pieces == most) return most + 1;
        const int first = units.first_token(piece.span, i, remote);
        const Rows rows = units.rows(piece.span, first);
        Found& tile_found = found[pieces++];
        tile_found = {worker, remote, piece.sequence, piece.head, slot, slots.total(),
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
        for (u32 j = 0; j < slots.total(); ++j) member = member || slots.at(j) == slot;
        if (!member) return most + 2;
      }
    }
  }
  return pieces;
}
"""


class Sizes(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint) for name in (
            "batch", "heads", "row_blocks", "queries", "tokens", "visible", "workers", "slots",
            "window",
        )),
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


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The headers as a library for this machine."""
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler is not None, "the extension needs a C++ compiler, and so does this test"
    folder: Path = tmp_path_factory.mktemp("division")
    (folder / "division.cpp").write_text(SOURCE)
    made = folder / "division.so"
    sizes = [f"-DTILE={TILE}", f"-DROW_BYTES={ROW_BYTES}"]
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{KERNELS}", *sizes]
    subprocess.run([*command, str(folder / "division.cpp"), "-o", str(made)], check=True)
    return ctypes.CDLL(str(made))


def divide(library: ctypes.CDLL, case: Case) -> Division:
    batch_bytes, head_bytes, token_bytes = case.strides()
    sizes = Sizes(
        case.batch, case.heads, case.row_blocks, case.queries, case.tokens, case.visible,
        case.workers, case.slots, case.window,
        (ctypes.c_uint64 * 2)(*case.splits), (ctypes.c_uint64 * 2)(*case.offsets),
        batch_bytes, head_bytes, token_bytes,
    )  # fmt: skip
    found = (Found * MOST_PIECES)()
    totals = (ctypes.c_uint * 4)()
    lengths = (ctypes.c_int * case.batch)(*case.lengths)
    starts = (ctypes.c_int * case.batch)(*case.starts)
    count = library.divide_work(ctypes.byref(sizes), lengths, starts, found, MOST_PIECES, totals)
    assert count <= MOST_PIECES, "a slot that the last to arrive would not read"
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
        workers=draw(st.integers(2, 80)), slots=draw(st.integers(2, 8)),
        window=draw(st.integers(1, 600_000)),
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
    assert all(slot < 2 * units + case.workers + 2 for slot in taken)
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
    tiles = [0] * case.workers
    for tile in division.tiles:
        tiles[tile.worker] += 1
    readers, others = tiles[: division.remote_workers], tiles[division.remote_workers :]
    for counts, total in ((readers, division.remote_tiles), (others, division.local_tiles)):
        if total and counts:
            assert max(counts) - min(counts) <= 1 and sum(counts) == total
