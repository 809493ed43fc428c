// Ordinary loads with their scope spelled out.
#pragma once

#include "types.cuh"

namespace dak::ptx {

// Never answered from L1; goes to the memory's owner where L2 does not cache it.
__device__ __forceinline__ u32 load_relaxed_system(const void* global) {
  u32 value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(global))
               : "memory");
  return value;
}

}  // namespace dak::ptx
