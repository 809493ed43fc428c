"""Lines of work (kernels/schedule/line.cuh), compiled for the CPU: the rules that workers rely on.

A worker that adds up the pieces of a tile waits for every run between the first and the last one,
so an empty run among them would never answer.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dak_inductor.cuda_runtime.nvrtc import KERNELS

SOURCE = """
#include <algorithm>
#define __device__
#define __forceinline__ inline
using std::max;
using std::min;
#include "schedule/line.cuh"

// Ends of all runs, of which `count` are returned, and what run_of finds for each position.
extern "C" unsigned cut(unsigned tiles, unsigned steps, unsigned short_runs, unsigned short_length,
                        unsigned last_cost, unsigned workers, unsigned* ends, unsigned* runs) {
  dak::schedule::Line line{};
  line.tiles = tiles;
  line.steps = steps;
  line.short_runs = short_runs;
  line.short_length = short_length;
  line.last_cost = last_cost;
  line.share(workers);
  const unsigned count = short_runs + line.long_runs;
  for (unsigned run = 0; run <= count; ++run) ends[run] = line.begin(run);
  for (unsigned position = 0; position < line.total(); ++position)
    runs[position] = line.run_of(position, 0);
  ends[count + 1] = line.begin(count + 7);
  return count;
}
"""

UNIT = 256


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The header as a library for this machine."""
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler is not None, "the extension needs a C++ compiler, and so does this test"
    folder: Path = tmp_path_factory.mktemp("line")
    (folder / "line.cpp").write_text(SOURCE)
    library = folder / "line.so"
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{KERNELS}"]
    subprocess.run([*command, str(folder / "line.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@st.composite
def lines(draw: st.DrawFn) -> tuple[int, int, int, int, int, int]:
    """tiles, steps, short runs, their length, cost of a step of the last tile, workers."""
    tiles, steps = draw(st.integers(1, 30)), draw(st.integers(1, 130))
    workers = draw(st.integers(1, 132))
    short = draw(st.integers(0, 4))
    length = draw(st.integers(0, tiles * steps // short)) if short else 0
    last = draw(st.integers(1, UNIT)) if length == 0 else UNIT
    return tiles, steps, short, length, last, workers


@settings(max_examples=400, deadline=None)
@given(lines())
def test_runs_cover_the_line_and_none_between_is_empty(
    cut: ctypes.CDLL, line: tuple[int, int, int, int, int, int]
) -> None:
    tiles, steps, short, length, last, workers = line
    ends = (ctypes.c_uint * (short + workers + 8))()
    runs = (ctypes.c_uint * (tiles * steps))()
    count = cut.cut(tiles, steps, short, length, last, workers, ends, runs)
    total = tiles * steps
    assert short < count <= short + workers
    assert ends[0] == 0 and ends[count] == total
    assert ends[count + 1] == total, "workers beyond the runs have nothing"
    long_runs = range(short, count)
    if total > short * length:
        assert all(ends[run] < ends[run + 1] for run in long_runs)
    for position in range(total):
        run = runs[position]
        assert ends[run] <= position < ends[run + 1]


@settings(max_examples=200, deadline=None)
@given(lines())
def test_long_runs_cost_the_same_within_a_step(
    cut: ctypes.CDLL, line: tuple[int, int, int, int, int, int]
) -> None:
    tiles, steps, short, length, last, workers = line
    ends = (ctypes.c_uint * (short + workers + 8))()
    runs = (ctypes.c_uint * (tiles * steps))()
    count = cut.cut(tiles, steps, short, length, last, workers, ends, runs)
    ordinary = (tiles - 1) * steps

    def cost(position: int) -> int:
        return min(position, ordinary) * UNIT + max(0, position - ordinary) * last

    costs = [cost(ends[run + 1]) - cost(ends[run]) for run in range(short, count)]
    assert max(costs) - min(costs) <= 2 * UNIT
