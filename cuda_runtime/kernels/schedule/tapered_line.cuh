// An even line of which the last part of each run is cut off in chunks that any worker may claim.
//
// SMs get unequal shares of the memory's bandwidth and start at different times: runs of equal
// length ended 5% apart on the H200. So each worker has the first part of a run for itself, and who
// is done with it claims chunks, the long ones first. Where the line is cut depends on sizes alone;
// who claims a chunk has no part in the result.
#pragma once

#include "schedule/even_line.cuh"
#include "schedule/line.cuh"
#include "types.cuh"

namespace dak::schedule {

struct TaperedLine {
  static constexpr u32 most_chunks = 4;

  EvenLine even;
  u32 chunks;                 // of each run, none longer than the one before
  u32 left[most_chunks + 1];  // positions from the start of a chunk to the end of its run

  // `share` of each run, below 1, becomes at most `most` chunks: each is half of what is left, the
  // last all of it, `least` or more. Less than twice that is not worth the results to be added up.
  static __device__ __forceinline__ TaperedLine cut(u32 total, u32 workers, float share = 0.0f,
                                                    u32 most = 0, u32 least = 2) {
    TaperedLine line{EvenLine::cut(total, workers), 0, {}};
    const u32 tail = static_cast<u32>(static_cast<float>(line.even.length) * share);
    if (tail < 2 * least) return line;
#pragma unroll
    for (u32 i = 0; i < most_chunks; ++i) {
      if (i == most || tail >> i < least) break;
      line.left[i] = tail >> i;
      line.chunks = i + 1;
    }
    return line;
  }

  // Each run is so many parts: what its worker has for itself, then the chunks.
  __device__ __forceinline__ u32 parts() const { return even.runs * (chunks + 1); }

  __device__ __forceinline__ u32 claimable() const { return even.runs * chunks; }

  // What the worker of a run has for itself: a part of this number.
  __device__ __forceinline__ Run own(u32 run) const {
    if (run >= even.runs) return {0, 0};
    return {even.begin(run), even.begin(run + 1) - left[0]};
  }

  __device__ __forceinline__ u32 own_part(u32 run) const { return run * (chunks + 1); }

  // In the order of claims: the first chunk of each run, then the second of each.
  __device__ __forceinline__ Run chunk(u32 claim) const {
    const u32 place = claim / even.runs;
    const u32 end = even.begin(claim - place * even.runs + 1);
    return {end - left[place], end - left[place + 1]};
  }

  __device__ __forceinline__ u32 chunk_part(u32 claim) const {
    const u32 place = claim / even.runs;
    return own_part(claim - place * even.runs) + 1 + place;
  }

  // The part that holds a position of the line.
  __device__ __forceinline__ u32 part_of(u32 position) const {
    const u32 run = even.run_of(position);
    const u32 back = even.begin(run + 1) - position;
    u32 part = own_part(run);
#pragma unroll
    for (u32 i = 0; i < most_chunks; ++i) part += left[i] >= back;
    return part;
  }
};

// What a worker may conclude from the count of claims before its own.
//
// The count is 0 between launches. Each worker claims until it is refused once, so the last to be
// refused knows that nobody will claim again, and sets the count back.
struct Claims {
  u32 chunks;
  u32 workers;

  __device__ __forceinline__ bool granted(u32 before) const { return before < chunks; }

  __device__ __forceinline__ bool last(u32 before) const {
    return before == chunks + workers - 1;
  }
};

}  // namespace dak::schedule
