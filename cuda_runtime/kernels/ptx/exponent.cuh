// Powers of two by the special-function unit.
#pragma once

#include "types.cuh"

namespace dak::ptx {

// 2^x with a relative error of about 2^-22; 0 for minus infinity and where the result is denormal.
__device__ __forceinline__ float exp2_approximate(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

}  // namespace dak::ptx
