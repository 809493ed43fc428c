// Clusters of CTAs: ranks, barriers and the shared memory of neighbours.
#pragma once

#include "ptx/shared_address.cuh"
#include "types.cuh"

namespace dak::ptx {

__device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ u32 cluster_size() {
  u32 size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// All threads of all CTAs of the cluster; what they wrote before is visible after.
__device__ __forceinline__ void cluster_synchronize() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
}

}  // namespace dak::ptx
