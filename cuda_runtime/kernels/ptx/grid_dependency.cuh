// Programmatic dependent launch: a kernel that starts while the one before it still runs.
#pragma once

#include "types.cuh"

namespace dak::ptx {

// Kernels launched to overlap this one may start when all its CTAs have said so.
__device__ __forceinline__ void launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Returns when the kernels before this one have ended and their writes are visible.
__device__ __forceinline__ void wait_for_predecessors() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

}  // namespace dak::ptx
