// Position in a ring of stages, with the parity that its barrier completes next.
#pragma once

#include "types.cuh"

namespace dak::pipeline {

struct RingPosition {
  u32 stage = 0;
  u32 parity = 0;

  __device__ __forceinline__ void advance(u32 stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace dak::pipeline
