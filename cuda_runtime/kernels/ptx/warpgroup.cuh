// What a warpgroup (four warps) does together, besides matrix products.
#pragma once

#include "types.cuh"

namespace dak::ptx {

// Give registers back, or take more: a multiple of 8, by all threads of a warpgroup.
template <u32 Registers>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <u32 Registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// Barrier `id` (1 to 15) among `threads` threads.
__device__ __forceinline__ void named_barrier(u32 id, u32 threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace dak::ptx
