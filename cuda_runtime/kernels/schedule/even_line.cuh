// Work as a line of positions of equal cost, cut into runs that differ by one position at most.
//
// The cut depends on sizes alone, so that whoever shares in something is known without asking, and
// sums are made in the same order every time.
#pragma once

#include "schedule/line.cuh"
#include "types.cuh"

namespace dak::schedule {

struct EvenLine {
  u32 total;
  u32 runs;      // none is empty; 0 where the line is
  u32 length;    // of a run,
  u32 longer;    // and of the first so many one more

  static __device__ __forceinline__ EvenLine cut(u32 total, u32 workers) {
    const u32 runs = min(total, workers);
    if (runs == 0) return {0, 0, 0, 0};
    return {total, runs, total / runs, total % runs};
  }

  __device__ __forceinline__ u32 begin(u32 run) const { return run * length + min(run, longer); }

  __device__ __forceinline__ Run run(u32 index) const {
    if (index >= runs) return {0, 0};
    return {begin(index), begin(index + 1)};
  }

  // The run that holds a position of the line.
  __device__ __forceinline__ u32 run_of(u32 position) const {
    const u32 in_longer = longer * (length + 1);
    const bool first = position < in_longer;
    return (first ? 0 : longer) + (first ? position : position - in_longer) / (length + first);
  }
};

}  // namespace dak::schedule
