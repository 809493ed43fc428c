// Work as a line of steps, cut into one run for each worker.
//
// A line is a block of output tiles times steps along K. Its positions count the steps of the first
// tile, then of the second, and so on. Runs follow each other along the line: first the long ones,
// then the short ones, of workers that have other work too. The cut depends on sizes alone, so that
// sums are made in the same order every time.
//
// Workers stand on the line in descending order. A tile that spans several runs is finished by the
// worker of its first piece, which comes to it at the end of its run, when the later pieces, at the
// start of theirs, are long done. It waits only for workers of lower number, which the GPU started
// before it: waiting cannot deadlock, whatever else runs.
//
// The workers started last come to SMs that the launch before freed last: they have had no time to
// fetch ahead, so the first runs of the line are theirs and are a little shorter. What is still uneven
// the line's tail evens out, where it has one (schedule/tail.cuh): tiles cut off before it is shared.
#pragma once

#include "types.cuh"

namespace dak::schedule {

struct Run {
  u32 begin;
  u32 end;
};

// Where a position lies.
struct Place {
  u32 tile;  // of the line
  u32 step;
};

// In costs, an ordinary step counts `unit`.
constexpr u32 unit = 256;

struct Line {
  int origin;  // feature of the first tile's first row; may be negative
  u32 tiles;
  u32 first_step;
  u32 steps;         // of each tile
  u32 long_runs;     // share in parts of equal cost what the short runs leave,
  u32 late;          // but run 0 costs that much less, run 1 half as much less, and so on
  u32 short_runs;    // of `short_length` each
  u32 short_length;
  u32 last_cost;     // of a step of the last tile, which may have few rows
  u32 each;          // of a long run: cost, and so many of the first runs have one more. Runs are
  u32 more;          // looked for one by one: divided again each took 0.1 us

  static constexpr u32 late_runs = 6;

  __device__ __forceinline__ u32 total() const { return tiles * steps; }

  // Of what the long runs share. Fits for 2^24 steps: 10^11 weights.
  __device__ __forceinline__ u32 cost() const {
    return (total() - short_runs * short_length - steps) * unit + steps * last_cost;
  }

  // Shares what is left among at most `workers` long runs, none of them empty: who adds up the pieces
  // of a tile waits for all runs in between. `most_late`: steps that the first run may have less.
  __device__ __forceinline__ void share(u32 workers, u32 most_late = 0) {
    const u32 all = cost();
    long_runs = max(1u, min(workers, all / unit));
    each = all / long_runs;
    late = long_runs > late_runs && each >= 4 * unit ? min(most_late * unit, each / 3) : 0;
    const u32 shared = all + late_by(late_runs);
    if (late > 0) each = shared / long_runs;
    more = shared - each * long_runs;
  }

  __device__ __forceinline__ u32 begin(u32 run) const {
    if (run > long_runs) {
      const u32 after = run - long_runs;
      return total() - (after < short_runs ? short_runs - after : 0) * short_length;
    }
    const u32 before = each * run + min(run, more) - late_by(min(run, late_runs));
    const u32 ordinary = cost() - steps * last_cost;
    return before < ordinary ? before / unit
                             : ordinary / unit + (before - ordinary) / last_cost;
  }

  __device__ __forceinline__ Run run(u32 index) const { return {begin(index), begin(index + 1)}; }

  // The run that holds a position. `guess` is a run at or before it.
  __device__ __forceinline__ u32 run_of(u32 position, u32 guess) const {
    while (begin(guess + 1) <= position) ++guess;
    return guess;
  }

  __device__ __forceinline__ Place place(u32 position) const {
    return {position / steps, first_step + position % steps};
  }

  // What the first `runs` runs, of the late ones, have less, all together.
  __device__ __forceinline__ u32 late_by(u32 runs) const {
    return 2 * late - (2 * late >> runs);
  }
};

}  // namespace dak::schedule
