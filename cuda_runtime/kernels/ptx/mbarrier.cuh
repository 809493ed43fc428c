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

// One arrival at a barrier of this CTA.
__device__ __forceinline__ void mbarrier_arrive(mbarrier_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// One arrival at the same barrier of CTA `rank` of the cluster. It orders nothing beyond this CTA:
// a release at cluster scope takes 0.45 us.
__device__ __forceinline__ void mbarrier_arrive_cluster(mbarrier_t* barrier, u32 rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Whether the phase of that parity has completed; returns at once.
__device__ __forceinline__ bool mbarrier_test_wait_parity(mbarrier_t* barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}\n"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
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

// The same, and what other CTAs of the cluster wrote before they arrived is visible afterwards.
__device__ __forceinline__ bool mbarrier_try_wait_parity_cluster(mbarrier_t* barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}\n"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

}  // namespace dak::ptx
