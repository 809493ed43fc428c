// From lengths and residency, read when the kernel starts, to the division of work.
#pragma once

#include "attention/arguments.cuh"
#include "attention/layout.cuh"
#include "attention/units.cuh"
#include "types.cuh"

namespace dak::attention {

__device__ __forceinline__ u32 sum_of_warp(u32 value) {
  return __reduce_add_sync(0xFFFFFFFF, value);
}

// Sum over the lanes before this one.
__device__ __forceinline__ u32 sum_before(u32 value, u32 lane) {
  u32 sum = value;
#pragma unroll
  for (u32 distance = 1; distance < 32; distance *= 2) {
    const u32 other = __shfl_up_sync(0xFFFFFFFF, sum, distance);
    if (lane >= distance) sum += other;
  }
  return sum - value;
}

// Where the caches are cut; two threads, before the lengths are known.
__device__ __forceinline__ void read_split(const Arguments& arguments, u32 side, Head& head) {
  const schedule::TierRecord* record = arguments.caches[side].record;
  head.division.splits[side] = record == nullptr ? all_local : __ldcg(&record->split);
}

// Fills `head`; all threads of the CTA.
template <TieredAttentionConfiguration configuration>
__device__ __forceinline__ void plan(const Arguments& arguments, u32 workers, Head& head) {
  using L = Layout<configuration>;
  const Units<L::tile, L::row_bytes> units(arguments, head.division, head.sequences);
  for (u32 i = threadIdx.x; i < arguments.batch; i += threads) {
    const int length = arguments.lengths == nullptr ? static_cast<int>(arguments.tokens)
                                                    : __ldcg(arguments.lengths + i);
    const int start = arguments.starts == nullptr ? 0 : __ldcg(arguments.starts + i);
    head.sequences[i] = units.range(length, start);
    const Count count = units.count(i);
    head.sequences[i].before[0] = count.tiles[0];
    head.sequences[i].before[1] = count.tiles[1];
    if (count.tiles[1] > 0) {
      atomicAdd(&head.remote_tokens, count.remote_tokens);
      atomicMax(&head.longest_remote, count.longest_remote);
    }
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    const u32 lane = threadIdx.x;
    const u32 window = arguments.window == nullptr ? 0 : __ldcg(arguments.window);
    Count total{{0, 0}, head.remote_tokens, head.longest_remote};
    for (u32 first = 0; first < arguments.batch; first += 32) {
      const u32 i = first + lane;
#pragma unroll
      for (u32 line = 0; line < 2; ++line) {
        const u32 own = i < arguments.batch ? head.sequences[i].before[line] : 0;
        const u32 before = total.tiles[line] + sum_before(own, lane);
        if (i < arguments.batch) head.sequences[i].before[line] = before;
        total.tiles[line] += sum_of_warp(own);
      }
    }
    if (lane == 0) {
      head.sequences[arguments.batch] = {0, 0, {total.tiles[0], total.tiles[1]}};
      divide(head.division, total, workers, window, L::tile, L::row_bytes, configuration.slots);
    }
  }
  __syncthreads();
}

}  // namespace dak::attention
