// Conversions between fp32 and pairs of 16-bit elements.
#pragma once

#include "types.cuh"

namespace dak::ptx {

// Two floats rounded to nearest and packed, `low` in the low half.
template <bool Half>
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 pair;
  if constexpr (Half) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

template <bool Half>
__device__ __forceinline__ float unpack(u16 bits) {
  float value;
  if constexpr (Half) {
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  } else {
    asm("mov.b32 %0, {%1, %2};" : "=f"(value) : "h"(static_cast<u16>(0)), "h"(bits));
  }
  return value;
}

}  // namespace dak::ptx
