"""Lines of work (kernels/schedule/line.cuh), compiled for the CPU: the rules that workers rely on.

A worker that adds up the pieces of a tile waits for every run between the first and the last one,
so an empty run among them would never answer.
"""

from __future__ import annotations

import ctypes
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .host_library import compile_for_host

SOURCE = """
#include <algorithm>
#define __device__
#define __forceinline__ inline
using std::max;
using std::min;
#include "schedule/line.cuh"

// Ends of all runs, of which `count` are returned, and what run_of finds for each position.
extern "C" unsigned cut(unsigned tiles, unsigned steps, unsigned short_runs, unsigned short_length,
                        unsigned last_cost, unsigned workers, unsigned late, unsigned* ends,
                        unsigned* runs) {
  dak::schedule::Line line{};
  line.tiles = tiles;
  line.steps = steps;
  line.short_runs = short_runs;
  line.short_length = short_length;
  line.last_cost = last_cost;
  line.share(workers, late);
  const unsigned count = short_runs + line.long_runs;
  for (unsigned run = 0; run <= count; ++run) ends[run] = line.begin(run);
  for (unsigned position = 0; position < line.total(); ++position)
    runs[position] = line.run_of(position, 0);
  ends[count + 1] = line.begin(count + 7);
  return count;
}
"""

UNIT = 256
LATE_RUNS = 6


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The header as a library for this machine."""
    return compile_for_host(SOURCE, tmp_path_factory.mktemp("line"))


@st.composite
def lines(draw: st.DrawFn) -> tuple[int, int, int, int, int, int, int]:
    """tiles, steps, short runs, their length, cost of a step of the last tile, workers, and the
    steps that the first run may have less."""
    tiles, steps = draw(st.integers(1, 30)), draw(st.integers(1, 130))
    workers = draw(st.integers(1, 132))
    short = draw(st.integers(0, 4))
    length = draw(st.integers(0, tiles * steps // short)) if short else 0
    last = draw(st.integers(1, UNIT)) if length == 0 else UNIT
    return tiles, steps, short, length, last, workers, draw(st.sampled_from([0, 0, 5, 20]))


@settings(max_examples=400, deadline=None)
@given(lines())
def test_runs_cover_the_line_and_none_between_is_empty(
    cut: ctypes.CDLL, line: tuple[int, int, int, int, int, int, int]
) -> None:
    tiles, steps, short, length, last, workers, late = line
    ends = (ctypes.c_uint * (short + workers + 8))()
    runs = (ctypes.c_uint * (tiles * steps))()
    count = cut.cut(tiles, steps, short, length, last, workers, late, ends, runs)
    total = tiles * steps
    assert short < count <= short + workers
    assert ends[0] == 0 and ends[count] == total
    assert ends[count + 1] == total, "workers beyond the runs have nothing"
    long_runs = range(count - short)
    if total > short * length:
        assert all(ends[run] < ends[run + 1] for run in long_runs)
    for run in range(count - short, count):
        assert ends[run + 1] - ends[run] == length
    for position in range(total):
        run = runs[position]
        assert ends[run] <= position < ends[run + 1]


@settings(max_examples=200, deadline=None)
@given(lines())
def test_long_runs_cost_the_same_within_a_step(
    cut: ctypes.CDLL, line: tuple[int, int, int, int, int, int, int]
) -> None:
    tiles, steps, short, length, last, workers, late = line
    ends = (ctypes.c_uint * (short + workers + 8))()
    runs = (ctypes.c_uint * (tiles * steps))()
    count = cut.cut(tiles, steps, short, length, last, workers, late, ends, runs)
    ordinary = (tiles - 1) * steps

    def cost(position: int) -> int:
        return min(position, ordinary) * UNIT + max(0, position - ordinary) * last

    costs = [cost(ends[run + 1]) - cost(ends[run]) for run in range(count - short)]
    even = costs[LATE_RUNS:] or costs
    assert max(even) - min(even) <= 2 * UNIT
    less = [max(even) - found for found in costs[:LATE_RUNS]]
    assert max(less) <= (late + 2) * UNIT
    assert all(left >= right - 2 * UNIT for left, right in pairwise(less)), "the first has least"


@pytest.mark.parametrize("late", [0, 17])
def test_the_runs_of_who_starts_last_are_shorter(cut: ctypes.CDLL, late: int) -> None:
    tiles, steps, workers = 224, 128, 132
    ends, runs = (ctypes.c_uint * (workers + 8))(), (ctypes.c_uint * (tiles * steps))()
    assert cut.cut(tiles, steps, 0, 0, UNIT, workers, late, ends, runs) == workers
    lengths = [ends[run + 1] - ends[run] for run in range(workers)]
    fair = tiles * steps / workers
    for run, length in enumerate(lengths):
        missing = late / 2**run if run < LATE_RUNS else 0
        assert abs(length - (fair - missing)) < 2, f"run {run}"
