// mbarrier: barriers in shared memory that count arrivals and the bytes of asynchronous copies.
#pragma once

#include "ptx/shared_address.cuh"
#include "types.cuh"

namespace dak::ptx {

// A barrier object; 8 bytes, aligned to 8, in shared memory.
using mbarrier_t = u64;

__device__ __forceinline__ void mbarrier_init(mbarrier_t* barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes initialised barriers visible to the asynchronous proxy and to the rest of the cluster.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// One arrival that also announces `bytes` which copies will complete.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(mbarrier_t* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Whether the phase of that parity has completed; may suspend the thread for a while.
__device__ __forceinline__ bool mbarrier_try_wait_parity(mbarrier_t* barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}\n"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

}  // namespace dak::ptx
