// cp.async.bulk.tensor for tensors of four dimensions; see tensor_copy.cuh.
#pragma once

#include "ptx/tensor_copy.cuh"

namespace dak::ptx {

// The box whose first element is (c0, c1, c2, c3), innermost first, to `shared`; `barrier` receives
// the bytes.
__device__ __forceinline__ void tensor_load_4d(void* shared, const TensorMap* map, int c0, int c1,
                                               int c2, int c3, mbarrier_t* barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(shared_address(shared)),
      "l"(reinterpret_cast<u64>(map)), "r"(c0), "r"(c1), "r"(c2), "r"(c3),
      "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

// The box to L2. Later writes are seen all the same: it may be asked for before they are made.
__device__ __forceinline__ void tensor_prefetch_4d(const TensorMap* map, int c0, int c1, int c2,
                                                   int c3) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];" ::"l"(
                   reinterpret_cast<u64>(map)),
               "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

}  // namespace dak::ptx
