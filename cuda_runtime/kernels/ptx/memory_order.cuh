// Ordinary loads and stores with their order and scope spelled out.
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

// What others wrote before they released the word is visible afterwards.
__device__ __forceinline__ u32 load_acquire_gpu(const u32* global) {
  u32 value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(global) : "memory");
  return value;
}

// What this thread wrote, and what it knows of from barriers, is visible to who acquires the word.
__device__ __forceinline__ void store_release_gpu(u32* global, u32 value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(global), "r"(value) : "memory");
}

}  // namespace dak::ptx
