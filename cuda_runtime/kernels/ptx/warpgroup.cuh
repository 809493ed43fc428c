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

// The same; whether any of them says so.
__device__ __forceinline__ bool named_barrier_or(u32 id, u32 threads, bool said) {
  u32 any;
  asm volatile(
      "{\n"
      ".reg .pred said, any;\n"
      "setp.ne.u32 said, %3, 0;\n"
      "bar.red.or.pred any, %1, %2, said;\n"
      "selp.u32 %0, 1, 0, any;\n"
      "}\n"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(static_cast<u32>(said))
      : "memory");
  return any != 0;
}

}  // namespace dak::ptx
