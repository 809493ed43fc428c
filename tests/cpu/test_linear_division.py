"""How the linear kernel divides its work (kernels/linear/plan.cuh), compiled for the CPU.

Whatever the sizes, splits and workers: each step of each tile is done once, by a run or by whoever
claims its piece of the tail; claims leave their word at zero; partial sums have a place each.
"""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dak_inductor.lowering.linear.configuration import DEPTH
from dak_inductor.lowering.linear.tail import TailRule

from .host_library import PRELUDE, compile_for_host

SOURCE = (
    PRELUDE
    + """
#include "linear/claims.cuh"
#include "linear/plan.cuh"
#include "linear/walk.cuh"

using namespace dak;
using namespace dak::linear;

struct Sizes {
  u32 features, depth, workers, maximum_remote, worker_bytes, window, late, seed;
  float link_steps, reader_steps, piece_steps, few_steps;
  schedule::TailRule tail;
  u32 copied[2];
  u64 splits[2];
};

struct Found {
  u32 worker, piece, depth, remote;
  int feature;
};

struct Totals {
  u32 local_runs, tail_tiles, spared, claims;  // what the word holds at the end
};

struct Worker {
  Claims claims;
  bool asked;
};

template <TieredLinearConfiguration configuration>
u32 divide_work(const Sizes& sizes, Found* found, u32 most, Totals& totals) {
  schedule::TierRecord records[2]{};
  Arguments arguments{};
  for (u32 i = 0; i < 2; ++i) {
    records[i].split = sizes.splits[i];
    arguments.weights[i].record = &records[i];
    arguments.weights[i].row_bytes =
        element_bytes * (configuration.in_out ? sizes.features : sizes.depth);
  }
  window::Record link{};
  window::LaunchWindow launch{};
  link.window = sizes.window;
  arguments.link = &link;
  arguments.launch = &launch;
  arguments.features = sizes.features;
  arguments.depth = sizes.depth;
  arguments.maximum_remote_workers = sizes.maximum_remote;
  arguments.worker_bytes = sizes.worker_bytes;
  arguments.link_steps = sizes.link_steps;
  arguments.reader_steps = sizes.reader_steps;
  arguments.piece_steps = sizes.piece_steps;
  arguments.few_steps = sizes.few_steps;
  arguments.late_steps = sizes.late;
  arguments.tail = sizes.tail;
  for (u32 i = 0; i < 2; ++i) arguments.copied[i] = sizes.copied[i];
  Head head{};
  plan<configuration>(arguments, sizes.workers, head);
  totals = {head.local.long_runs + head.local.short_runs, head.tail.tiles, head.spared, 0};

  u32 steps = 0;
  const auto note = [&](Walk& walk, u32 worker, u32 piece, u32 count) {
    for (u32 i = 0; i < count && steps < most; ++i) {
      const Step step = walk.next();
      found[steps++] = {worker, piece, step.depth, step.remote, step.feature};
    }
  };
  constexpr u32 features = Layout<configuration>::features;
  std::vector<Worker> all;
  std::vector<u32> left;
  for (u32 worker = 0; worker < sizes.workers; ++worker) {
    head.assignment = assign<configuration>(head, worker, sizes.workers);
    Walk walk(head, features);
    note(walk, worker, schedule::Tail::nothing, head.assignment.steps());
    all.push_back({Claims(head.tail, &totals.claims, sizes.workers), false});
    left.push_back(worker);
  }
  // they ask and take in any order
  for (u32 random = sizes.seed; !left.empty();) {
    random = random * 1664525 + 1013904223;
    const u32 index = (random >> 8) % left.size();
    Worker& worker = all[left[index]];
    if (!worker.asked) {
      worker.claims.ask();
      worker.asked = true;
      continue;
    }
    worker.asked = false;
    const u32 piece = worker.claims.take();
    if (piece == schedule::Tail::nothing) {
      left.erase(left.begin() + index);
      continue;
    }
    const schedule::Run run = head.tail.run(piece);
    Walk walk(head, features);
    walk.go_on_at(run.begin);
    note(walk, left[index], piece, run.end - run.begin);
  }
  return steps;
}

extern "C" u32 divide_out_in(const Sizes* sizes, Found* found, u32 most, Totals* totals) {
  return divide_work<{.tokens = 16, .blocks = 1, .stages = 12, .ctas_per_sm = 1}>(
      *sizes, found, most, *totals);
}

extern "C" u32 divide_gated(const Sizes* sizes, Found* found, u32 most, Totals* totals) {
  return divide_work<{.tokens = 16, .blocks = 2, .stages = 6, .ctas_per_sm = 1, .gated = true}>(
      *sizes, found, most, *totals);
}

extern "C" u32 divide_in_out(const Sizes* sizes, Found* found, u32 most, Totals* totals) {
  return divide_work<{.tokens = 16, .blocks = 1, .stages = 12, .ctas_per_sm = 1, .in_out = true}>(
      *sizes, found, most, *totals);
}
"""
)

FEATURES = 128  # of a tile, in all three
NOTHING = 2**32 - 1
MOST_STEPS = 1 << 16


class Sizes(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint) for name in (
            "features", "depth", "workers", "maximum_remote", "worker_bytes", "window", "late",
            "seed",
        )),
        *((name, ctypes.c_float) for name in (
            "link_steps", "reader_steps", "piece_steps", "few_steps",
        )),
        *((name, ctypes.c_uint) for name in ("share", "pieces", "least", "spared")),
        ("copied", ctypes.c_uint * 2),
        ("splits", ctypes.c_uint64 * 2),
    )  # fmt: skip

    def __repr__(self) -> str:
        values = ((name, getattr(self, name)) for name, _ in self._fields_)
        return ", ".join(
            f"{name}={list(value) if name in ('copied', 'splits') else value}"
            for name, value in values
        )


class Found(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint) for name in ("worker", "piece", "depth", "remote")),
        ("feature", ctypes.c_int),
    )


class Totals(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint) for name in ("local_runs", "tail_tiles", "spared", "claims")
    )


@dataclass(frozen=True)
class Division:
    steps: list[Found]
    totals: Totals

    def pieces(self) -> dict[int, list[Found]]:
        """The steps of the tail, by piece."""
        found: dict[int, list[Found]] = {}
        for step in self.steps:
            if step.piece != NOTHING:
                found.setdefault(step.piece, []).append(step)
        return found


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The headers as a library for this machine."""
    return compile_for_host(SOURCE, tmp_path_factory.mktemp("division"))


def divide(library: ctypes.CDLL, kind: str, sizes: Sizes) -> Division:
    found, totals = (Found * MOST_STEPS)(), Totals()
    count = getattr(library, f"divide_{kind}")(
        ctypes.byref(sizes), found, MOST_STEPS, ctypes.byref(totals)
    )
    assert count < MOST_STEPS
    return Division(list(found[:count]), totals)


@st.composite
def sizes(draw: st.DrawFn, kind: str) -> Sizes:
    """Any sizes and splits; rates around those of a card behind PCIe."""
    depth, features = 8 * draw(st.integers(1, 250)), 8 * draw(st.integers(1, 500))
    steps = -(-depth // DEPTH)
    rows, width = (depth, features) if kind == "in_out" else (features, depth)
    shares = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))
    splits = tuple(int(draw(shares) * rows) * width * 2 for _ in range(2))
    window = draw(st.sampled_from([64, 384, 2048])) * 1024
    byte = draw(st.sampled_from([1e-3, 1.2e-3 / 8])) / 16
    workers = draw(st.integers(1, 132))
    first = draw(st.sampled_from([features, 8 * draw(st.integers(0, features // 8))]))
    return Sizes(
        features=features,
        depth=depth,
        workers=workers,
        maximum_remote=min(workers, draw(st.integers(1, 24))),
        worker_bytes=draw(st.sampled_from([16, 32, 48])) * 1024,
        window=window,
        late=draw(st.sampled_from([0, 20])),
        seed=draw(st.integers(0, 2**32 - 1)),
        link_steps=byte,
        reader_steps=8 * byte,
        piece_steps=draw(st.sampled_from([0.1, 0.3, 2.0])),
        few_steps=draw(st.sampled_from([0.0, 0.9, 4.0])),
        share=draw(st.integers(0, 128)),
        pieces=draw(st.integers(1, steps)),
        least=draw(st.integers(1, 100)),
        spared=draw(st.sampled_from([0, 4])),
        copied=(first, draw(st.sampled_from([first, features]))),
        splits=splits,
    )


@pytest.mark.parametrize("kind", ["out_in", "gated", "in_out"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_each_step_is_done_once(library: ctypes.CDLL, kind: str, data: st.DataObject) -> None:
    given_sizes = data.draw(sizes(kind))
    division = divide(library, kind, given_sizes)
    depths = range(0, given_sizes.depth, DEPTH)
    done = [(step.feature, step.depth) for step in division.steps]
    assert len(set(done)) == len(done)
    tiles = sorted({feature for feature, _ in done})
    assert set(done) == set(itertools.product(tiles, depths))
    assert all(after - before == FEATURES for before, after in itertools.pairwise(tiles))
    assert tiles[0] <= 0 < tiles[0] + FEATURES
    assert tiles[-1] < given_sizes.features <= tiles[-1] + FEATURES
    if kind == "in_out":
        assert division.totals.tail_tiles == 0
    rows, width = given_sizes.features, given_sizes.depth
    if kind == "in_out":
        rows, width = width, rows
    splits = list(given_sizes.splits)[: 2 if kind == "gated" else 1]
    in_place = kind == "in_out" or min(given_sizes.copied) >= given_sizes.features
    any_remote = any(split < rows * width * 2 for split in splits)
    assert any(step.remote for step in division.steps) == (any_remote and in_place)
    if not in_place:
        first = min(given_sizes.copied)
        assert all(not tile < first < tile + FEATURES for tile in tiles)


@pytest.mark.parametrize("kind", ["out_in", "gated"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_tail_is_cut_by_sizes_and_claimed_once(
    library: ctypes.CDLL, kind: str, data: st.DataObject
) -> None:
    given_sizes = data.draw(sizes(kind))
    division = divide(library, kind, given_sizes)
    assert division.totals.claims == 0, "the next launch begins with the word at zero"
    pieces = division.pieces()
    rule = TailRule(given_sizes.share, given_sizes.pieces, given_sizes.least, given_sizes.spared)
    count = division.totals.tail_tiles * rule.pieces
    assert sorted(pieces) == list(range(count))
    assert count == 0 or count >= rule.least
    if rule.pieces > 1:
        assert count <= rule.slots(-(-given_sizes.features // FEATURES)), "a slot for each"
    last_local = max((s.feature for s in division.steps if not s.remote), default=0)
    for piece, steps in pieces.items():
        assert len({step.worker for step in steps}) == len({step.feature for step in steps}) == 1
        depths = [step.depth for step in steps]
        assert depths == list(range(depths[0], depths[0] + len(depths) * DEPTH, DEPTH))
        assert not any(step.remote for step in steps)
        behind = (count - 1 - piece) // rule.pieces  # tiles, of the last local ones
        assert steps[0].feature == last_local - behind * FEATURES
    lengths = [len(steps) for steps in pieces.values()]
    assert not lengths or max(lengths) - min(lengths) <= 1
    runs = [step for step in division.steps if not step.remote and step.piece == NOTHING]
    assert not pieces or runs, "the tail is never all there is"
    assert division.totals.spared <= (rule.spared if pieces else 0)
    started_last = given_sizes.workers - division.totals.spared
    assert all(step.worker < started_last for step in runs)
    # who is first and who is last has no part in it
    again = Sizes.from_buffer_copy(given_sizes)
    again.seed ^= 0x5A5A5A5A
    other = divide(library, kind, again).pieces()
    for piece, steps in pieces.items():
        assert [(s.feature, s.depth) for s in steps] == [(s.feature, s.depth) for s in other[piece]]


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 400).map(lambda eighths: 8 * eighths),
    depth=st.sampled_from([4096, 8192, 28672]),
    gigabytes=st.sampled_from([51.0, 376.0]),
)
def test_readers_end_together(
    library: ctypes.CDLL, rows: int, depth: int, gigabytes: float
) -> None:
    """Also where the last tile has few rows, whose boxes a fast link brings sooner than they can be
    asked for. Rates of an H200 in microseconds: a step of local rows takes 0.47."""
    step, least, tile = 0.47, 0.9, FEATURES * DEPTH * 2
    fast = gigabytes > 100
    byte, reader = 1e-3 / gigabytes, 1e-3 / min(gigabytes / 8, 30.0)
    features = 16 * 1024
    split = (features - rows) * depth * 2
    division = divide(library, "out_in", Sizes(
        features=features, depth=depth, workers=132, maximum_remote=16 if fast else 33,
        worker_bytes=(64 if fast else 32) * 1024, window=(1056 if fast else 384) * 1024,
        late=20, seed=1, link_steps=byte / step, reader_steps=reader / step, piece_steps=0.3,
        few_steps=least / step,
        share=64, pieces=8, least=99, spared=4, copied=(features, features), splits=(split, split),
    ))  # fmt: skip
    remote = [step for step in division.steps if step.remote]
    readers = len({step.worker for step in remote})
    whole = max(tile * reader, tile * byte * readers)
    few = rows % FEATURES
    last = max(few * DEPTH * 2 * reader, least)
    times = dict.fromkeys((step.worker for step in remote), 0.0)
    for each in remote:
        times[each.worker] += last if few and each.feature + few == features else whole
    assert max(times.values()) <= 1.25 * sum(times.values()) / readers + 2 * whole
