// Work as a line of steps, cut into one run for each worker.
//
// A line is a block of output tiles times steps along K. Its positions count the steps of the first
// tile, then of the second, and so on. Runs follow each other along the line: first the short ones,
// of workers that have other work too, then the long ones. The cut depends on sizes alone, so that
// sums are made in the same order every time.
//
// Workers stand on the line in descending order: worker `workers - 1` has run 0. A tile that spans
// several runs is finished by the worker of its first piece, which comes to it at the end of its
// run, when the later pieces, at the start of theirs, are long done. It waits only for workers of
// lower number, which the GPU started before it: waiting cannot deadlock, whatever else runs.
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
  u32 short_runs;    // the first runs, of `short_length` each
  u32 short_length;
  u32 long_runs;     // share the rest in parts of equal cost
  u32 last_cost;     // of a step of the last tile, which may have few rows

  __device__ __forceinline__ u32 total() const { return tiles * steps; }

  // Of what the long runs share. Fits for 2^24 steps: 10^11 weights.
  __device__ __forceinline__ u32 cost() const {
    return (total() - short_runs * short_length - steps) * unit + steps * last_cost;
  }

  // Shares what is left among at most `workers` long runs, none of them empty: who adds up the pieces
  // of a tile waits for all runs in between.
  __device__ __forceinline__ void share(u32 workers) {
    long_runs = max(1u, min(workers, cost() / unit));
  }

  __device__ __forceinline__ u32 begin(u32 run) const {
    if (run < short_runs) return run * short_length;
    const u32 index = min(run - short_runs, long_runs);  // workers beyond have nothing
    const u32 shared = cost();
    const u32 before = shared / long_runs * index + min(index, shared % long_runs);
    const u32 ordinary = shared - steps * last_cost;
    const u32 position = before < ordinary ? before / unit
                                           : ordinary / unit + (before - ordinary) / last_cost;
    return short_runs * short_length + position;
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
};

}  // namespace dak::schedule
