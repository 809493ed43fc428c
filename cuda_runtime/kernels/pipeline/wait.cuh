// Waiting for a barrier: forever, or in debug builds for a while and then with the barrier's name.
#pragma once

#include "ptx/mbarrier.cuh"
#include "ptx/timer.cuh"
#include "types.cuh"

namespace dak::pipeline {

constexpr u64 bounded_wait_nanoseconds = 2'000'000'000;

enum class Scope { cta, cluster };

// Until `done` says so. `name` and `parity` are those of the barrier that it asks.
template <bool Bounded, typename Done>
__device__ __forceinline__ void wait_until(const Done& done, u32 parity, const char* name) {
  if constexpr (Bounded) {
    const u64 deadline = ptx::globaltimer() + bounded_wait_nanoseconds;
    while (!done()) {
      if (ptx::globaltimer() > deadline) {
        printf("dak: CTA %u, thread %u: barrier '%s' never completed phase %u\n", blockIdx.x,
               threadIdx.x, name, parity);
        __trap();
      }
    }
  } else {
    while (!done()) {
    }
  }
}

template <bool Bounded, Scope scope = Scope::cta>
__device__ __forceinline__ void wait(ptx::mbarrier_t* barrier, u32 parity, const char* name) {
  const auto done = [&] {
    if constexpr (scope == Scope::cluster) {
      return ptx::mbarrier_try_wait_parity_cluster(barrier, parity);
    } else {
      return ptx::mbarrier_try_wait_parity(barrier, parity);
    }
  };
  wait_until<Bounded>(done, parity, name);
}

}  // namespace dak::pipeline
