// The clock that all SMs share.
#pragma once

#include "types.cuh"

namespace dak::ptx {

// Nanoseconds; advances in steps of up to about a microsecond.
__device__ __forceinline__ u64 globaltimer() {
  u64 now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

}  // namespace dak::ptx
