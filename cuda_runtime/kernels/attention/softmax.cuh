// Online softmax of a warpgroup's rows: scores in registers as wgmma leaves them, tile after tile.
//
// A thread holds scores of two rows, `row` and 8 below it; four threads share a row. Powers are of 2:
// scores are scaled by log2(e) as well.
#pragma once

#include "attention/arguments.cuh"
#include "attention/visibility.cuh"
#include "ptx/convert.cuh"
#include "ptx/exponent.cuh"
#include "types.cuh"

namespace dak::attention {

constexpr float minus_infinity = __builtin_bit_cast(float, 0xFF800000u);

// The token of register `r` in a tile, for thread `lane % 4` of a row.
__device__ __forceinline__ constexpr int column_of(u32 r, u32 lane) {
  return static_cast<int>(8 * (r / 4) + 2 * (lane % 4) + r % 2);
}

template <u32 Tile>
struct Softmax {
  static constexpr u32 registers = Tile / 2;
  static constexpr u32 depths = Tile / 16;

  float peak[2];  // largest score, unscaled
  float sum[2];   // this thread's part of the sum of powers

  // cap * tanh(scale * score / cap) in units of the cap.
  static __device__ __forceinline__ void cap(float (&scores)[registers], float factor) {
#pragma unroll
    for (u32 r = 0; r < registers; ++r) {
      const float power = ptx::exp2_approximate(scores[r] * factor);
      scores[r] = 1.0f - __fdividef(2.0f, power + 1.0f);
    }
  }

  // Hides what the rows do not see; `first` is the tile's first token.
  static __device__ __forceinline__ void hide(float (&scores)[registers],
                                              const Visibility& visible, int first, u32 lane) {
#pragma unroll
    for (u32 r = 0; r < registers; ++r) {
      const Range& seen = visible.rows[r / 2 % 2];
      const int token = first + column_of(r, lane);
      if (token < seen.begin || token >= seen.end) scores[r] = minus_infinity;
    }
  }

  // Scores to powers, as the first operand of P V; `factor` is what earlier results are scaled by.
  template <bool Half>
  __device__ __forceinline__ void add(float (&scores)[registers], u32 (&powers)[depths][4],
                                      float scale, float (&factor)[2]) {
    float shift[2];
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      float highest = peak[i];
#pragma unroll
      for (u32 r = 2 * i; r < registers; r += 4) {
        highest = fmaxf(highest, fmaxf(scores[r], scores[r + 1]));
      }
      highest = of_row(highest, [](float a, float b) { return fmaxf(a, b); });
      // a row that has seen nothing yet has no finite score
      shift[i] = highest == minus_infinity ? 0.0f : highest * scale;
      factor[i] = ptx::exp2_approximate(peak[i] * scale - shift[i]);
      peak[i] = highest;
      sum[i] *= factor[i];
    }
#pragma unroll
    for (u32 r = 0; r < registers; ++r) {
      const u32 i = r / 2 % 2;
      scores[r] = ptx::exp2_approximate(scores[r] * scale - shift[i]);
      sum[i] += scores[r];
    }
#pragma unroll
    for (u32 depth = 0; depth < depths; ++depth) {
#pragma unroll
      for (u32 i = 0; i < 4; ++i) {
        powers[depth][i] =
            ptx::pack<Half>(scores[8 * depth + 2 * i], scores[8 * depth + 2 * i + 1]);
      }
    }
  }

  // The sum of powers of each row, and its largest score times `scale`: in powers of 2.
  __device__ __forceinline__ void finish(float scale) {
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      sum[i] = of_row(sum[i], [](float a, float b) { return a + b; });
      peak[i] = peak[i] * scale;
    }
  }

 private:
  template <typename Operation>
  static __device__ __forceinline__ float of_row(float value, Operation operation) {
    value = operation(value, __shfl_xor_sync(0xFFFFFFFF, value, 1));
    return operation(value, __shfl_xor_sync(0xFFFFFFFF, value, 2));
  }
};

}  // namespace dak::attention
