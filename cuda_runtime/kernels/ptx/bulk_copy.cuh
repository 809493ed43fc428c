// cp.async.bulk: copies of contiguous bytes by the copy unit of an SM. Addresses and sizes are
// multiples of 16 bytes.
#pragma once

#include "ptx/mbarrier.cuh"
#include "ptx/shared_address.cuh"
#include "types.cuh"

namespace dak::ptx {

// Global to shared memory; `barrier` receives the bytes.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, u32 bytes,
                                          mbarrier_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// Shared to global memory; completion is by bulk groups of the issuing thread.
__device__ __forceinline__ void bulk_store(void* global, const void* shared, u32 bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
                   __cvta_generic_to_global(global)),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void bulk_commit_group() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until at most `Pending` groups of this thread have not been written.
template <int Pending>
__device__ __forceinline__ void bulk_wait_group() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory");
}

// Waits until at most `Pending` groups of this thread have not been read from shared memory yet.
template <int Pending>
__device__ __forceinline__ void bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

// Orders ordinary writes to shared memory before copies that read them.
__device__ __forceinline__ void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace dak::ptx
