// The clock that all SMs share, and an SM's own.
#pragma once

#include "types.cuh"

namespace dak::ptx {

// Nanoseconds; advances in steps of up to about a microsecond.
__device__ __forceinline__ u64 globaltimer() {
  u64 now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

// Cycles of this SM, modulo 2^32: two seconds and more. Not comparable with those of another SM.
__device__ __forceinline__ u32 cycles() {
  u32 now;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(now)::"memory");
  return now;
}

}  // namespace dak::ptx
