// cp.async.bulk.tensor: boxes of a matrix, by its tensor map, into shared memory (TMA).
//
// Parts of a box that lie outside the matrix, before its start too, arrive as zeros and count as
// bytes all the same.
#pragma once

#include "ptx/mbarrier.cuh"
#include "ptx/shared_address.cuh"
#include "types.cuh"

namespace dak::ptx {

// What cuTensorMapEncodeTiled makes; a kernel takes it as a __grid_constant__ parameter.
struct alignas(64) TensorMap {
  u64 opaque[16];
};

// Policies of L2 for what a copy reads.
constexpr u64 evict_first = 0x12F0000000000000;
constexpr u64 evict_last = 0x14F0000000000000;

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<u64>(map)) : "memory");
}

// The box whose first element is (column, row) to `shared`; `barrier` receives the bytes.
__device__ __forceinline__ void tensor_load(void* shared, const TensorMap* map, int column, int row,
                                            mbarrier_t* barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(shared)),
      "l"(reinterpret_cast<u64>(map)), "r"(column), "r"(row), "r"(shared_address(barrier)),
      "l"(policy)
      : "memory");
}

// The same into each CTA of the cluster whose bit is set in `ctas`, at the same address in each,
// and each one's own barrier receives the bytes. The box crosses the link once.
__device__ __forceinline__ void tensor_load_multicast(void* shared, const TensorMap* map,
                                                      int column, int row, mbarrier_t* barrier,
                                                      u64 policy, u16 ctas) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(
          shared_address(shared)),
      "l"(reinterpret_cast<u64>(map)), "r"(column), "r"(row), "r"(shared_address(barrier)),
      "h"(ctas), "l"(policy)
      : "memory");
}

}  // namespace dak::ptx
