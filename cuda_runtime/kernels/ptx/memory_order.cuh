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

// Read anew each time: never from L1, nor from an earlier load of the same word.
__device__ __forceinline__ int load_relaxed_gpu(const int* global) {
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(global) : "memory");
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

// Adds and returns what was there. What this thread wrote, and what it knows of from barriers, is
// visible to who adds later, and what those wrote who added before is visible afterwards.
__device__ __forceinline__ u32 add_acquire_release_gpu(u32* global, u32 value) {
  u32 before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(global), "r"(value)
               : "memory");
  return before;
}

// Adds and returns what was there; orders nothing.
__device__ __forceinline__ u32 add_relaxed_gpu(u32* global, u32 value) {
  u32 before;
  asm volatile("atom.add.relaxed.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(global), "r"(value)
               : "memory");
  return before;
}

}  // namespace dak::ptx
