// The sums of a warpgroup: 64 rows (features) by `Tokens` columns, fp32, as wgmma leaves them.
//
// Thread t holds the rows 16 * (t / 32) + (t % 32) / 4 and 8 below it. Register r belongs to column
// 8 * (r / 4) + 2 * (t % 4) + r % 2, and to the lower of the two rows where r / 2 is odd.
#pragma once

#include "types.cuh"

namespace dak::tile {

constexpr u32 warpgroup_threads = 128;

template <u32 Tokens>
struct Accumulator {
  static constexpr u32 registers = Tokens / 2;
  static constexpr u32 elements = 64 * Tokens;

  float sums[registers];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (u32 r = 0; r < registers; ++r) sums[r] = 0.0f;
  }

  // Each thread's sums, four at a time, so that a warp writes 512 contiguous bytes.
  __device__ __forceinline__ void store(float* global, u32 thread) const {
    float4* place = reinterpret_cast<float4*>(global) + thread;
#pragma unroll
    for (u32 r = 0; r < registers; r += 4) {
      __stcg(place + r / 4 * warpgroup_threads,
             make_float4(sums[r], sums[r + 1], sums[r + 2], sums[r + 3]));
    }
  }

  // What `store` of another CTA has written.
  __device__ __forceinline__ void load(const float* global, u32 thread) {
    const float4* place = reinterpret_cast<const float4*>(global) + thread;
#pragma unroll
    for (u32 r = 0; r < registers; r += 4) {
      const float4 part = __ldcg(place + r / 4 * warpgroup_threads);
      sums[r] = part.x;
      sums[r + 1] = part.y;
      sums[r + 2] = part.z;
      sums[r + 3] = part.w;
    }
  }

  __device__ __forceinline__ void add(const Accumulator& other) {
#pragma unroll
    for (u32 r = 0; r < registers; ++r) sums[r] += other.sums[r];
  }

  // Adds it, without as many registers again.
  __device__ __forceinline__ void add(const float* global, u32 thread) {
    const float4* place = reinterpret_cast<const float4*>(global) + thread;
#pragma unroll
    for (u32 r = 0; r < registers; r += 4) {
      const float4 part = __ldcg(place + r / 4 * warpgroup_threads);
      sums[r] += part.x;
      sums[r + 1] += part.y;
      sums[r + 2] += part.z;
      sums[r + 3] += part.w;
      // all loads at once would need as many registers again
      if (r % 32 == 28) asm volatile("" ::: "memory");
    }
  }
};

}  // namespace dak::tile
