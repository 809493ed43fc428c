// From lengths and residency, read when the kernel starts, to the division of work.
#pragma once

#include "attention/arguments.cuh"
#include "attention/division.cuh"
#include "attention/layout.cuh"
#include "attention/units.cuh"
#include "ptx/memory_order.cuh"
#include "types.cuh"
#include "window/reading.cuh"

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

// Where the caches are cut, and the link's window; three threads, so that none waits for another.
__device__ __forceinline__ void read_residency(const Arguments& arguments, u32 which, Head& head) {
  if (which < 2) {
    const schedule::TierRecord* record = arguments.caches[which].record;
    head.division.splits[which] = record == nullptr ? all_local : __ldcg(&record->split);
  } else {
    head.window = arguments.link == nullptr ? window::Reading{0, 0}
                                            : window::read(arguments.link, arguments.launch);
  }
}

// Lengths and starts: what the kernels before may still write.
template <TieredAttentionConfiguration configuration>
class Bounds {
  using L = Layout<configuration>;

 public:
  __device__ __forceinline__ Bounds(const Arguments& arguments, Head& head)
      : arguments_(arguments), head_(head), units_(arguments, head.division, head.sequences) {}

  __device__ __forceinline__ bool constant() const {
    return arguments_.lengths == nullptr && arguments_.starts == nullptr;
  }

  // Notes what they are now; all threads, with a barrier of the CTA on either side.
  __device__ __forceinline__ void read() const {
    for (u32 i = threadIdx.x; i < arguments_.batch; i += threads) head_.sequences[i] = now(i);
    if (threadIdx.x == 0) head_.remote_units = head_.remote_tokens = head_.longest_remote = 0;
  }

  // Whether a thread finds others than were noted.
  __device__ __forceinline__ bool changed() const {
    bool found = false;
    for (u32 i = threadIdx.x; i < arguments_.batch; i += threads) {
      const Sequence tokens = now(i);
      const Sequence& noted = head_.sequences[i];
      found = found || tokens.begin != noted.begin || tokens.end != noted.end;
    }
    return found;
  }

 private:
  __device__ __forceinline__ Sequence now(u32 i) const {
    const int length = arguments_.lengths == nullptr
                           ? static_cast<int>(arguments_.tokens)
                           : ptx::load_relaxed_gpu(arguments_.lengths + i);
    const int start =
        arguments_.starts == nullptr ? 0 : ptx::load_relaxed_gpu(arguments_.starts + i);
    return units_.range(length, start);
  }

  const Arguments& arguments_;
  Head& head_;
  const Units<L::tile, L::row_bytes> units_;
};

// Divides the work by bounds and splits that `head` has; all threads of the CTA.
template <TieredAttentionConfiguration configuration>
__device__ __forceinline__ void plan(const Arguments& arguments, u32 workers, Head& head) {
  using L = Layout<configuration>;
  const Units<L::tile, L::row_bytes> units(arguments, head.division, head.sequences);
  const u32 lane = threadIdx.x % 32;
  for (u32 first = threadIdx.x - lane; first < arguments.batch; first += threads) {
    const u32 i = first + lane;
    Count count{};
    if (i < arguments.batch) {
      count = units.count(i);
      head.sequences[i].before[0] = count.tiles[0];
      head.sequences[i].before[1] = count.tiles[1];
    }
    if (__any_sync(0xFFFFFFFF, count.tiles[1] > 0)) {
      const u32 found = sum_of_warp(count.remote_units);
      const u32 tokens = sum_of_warp(count.remote_tokens);
      const u32 longest = __reduce_max_sync(0xFFFFFFFF, count.longest_remote);
      if (lane == 0) {
        atomicAdd(&head.remote_units, found);
        atomicAdd(&head.remote_tokens, tokens);
        atomicMax(&head.longest_remote, longest);
      }
    }
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    Count total{{0, 0}, head.remote_units, head.remote_tokens, head.longest_remote};
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
      divide(head.division, arguments, total, workers, head.window.window, L::tile, L::row_bytes,
             configuration.slots);
    }
  }
  __syncthreads();
}

}  // namespace dak::attention
