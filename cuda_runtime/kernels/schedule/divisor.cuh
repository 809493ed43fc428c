// Division by a number that the host knows: a few instructions instead of some twenty, which the
// start of a kernel would wait for. lowering/attention/launch.py makes it.
#pragma once

#include "types.cuh"

namespace dak::schedule {

// By d, from 1 to 2^31: with 2^(shift - 1) < d <= 2^shift, multiplier 2^32 (2^shift - d) / d + 1
// rounded down. Exact for all 32-bit numbers (Granlund and Montgomery, 1994, figure 4.1).
struct Divisor {
  u32 multiplier;
  u32 shift;

  __device__ __forceinline__ u32 quotient(u32 value) const {
    const u32 high = __umulhi(multiplier, value);
    // the shift by two parts keeps the sum within 32 bits
    const u32 first = shift > 0;
    return (high + ((value - high) >> first)) >> (shift - first);
  }
};

}  // namespace dak::schedule
