// From sums in registers to the output: bias, activation, gate, residual.
#pragma once

#include "linear/arguments.cuh"
#include "linear/layout.cuh"
#include "ptx/convert.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/accumulator.cuh"
#include "types.cuh"

namespace dak::linear {

// x times the standard normal distribution's cumulative function, to 2e-7: Abramowitz and Stegun
// 7.1.26, kept free of cancellation for negative x.
__device__ __forceinline__ float gelu(float x) {
  const float z = fabsf(x) * 0.70710678f;
  const float t = __fdividef(1.0f, 1.0f + 0.3275911f * z);
  const float polynomial =
      ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t +
       0.254829592f) *
      t;
  const float tail = 0.5f * polynomial * __expf(-z * z);
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

template <Activation activation>
__device__ __forceinline__ float activate(float x) {
  if constexpr (activation == Activation::silu) return __fdividef(x, 1.0f + __expf(-x));
  if constexpr (activation == Activation::gelu) return gelu(x);
  if constexpr (activation == Activation::gelu_tanh) {
    // 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u))
    const float u = 0.79788456f * (x + 0.044715f * x * x * x);
    return __fdividef(x, 1.0f + __expf(-2.0f * u));
  }
  return x;
}

// Writes 64 features by `tokens` of one warpgroup. `feature` and `token` are those of the corner.
//
// Sums have features along the rows of a fragment, the output has them along its rows in memory. A
// few tokens at a time turn around in shared memory, so that 8 threads write the 128 bytes of a
// token and read its residual in the same way.
template <TieredLinearConfiguration configuration>
class Epilogue {
  using L = Layout<configuration>;
  using Sums = tile::Accumulator<configuration.tokens>;
  static constexpr u32 vector = 8;  // features of a thread: 16 bytes
  static constexpr u32 vectors = 64 / vector;
  static constexpr u32 tokens_at_once = tile::warpgroup_threads / vectors;

 public:
  // `turn`: shared memory of this warpgroup, L::turn_bytes.
  __device__ __forceinline__ Epilogue(const Arguments& arguments, float* turn, int feature,
                                      u32 token, u32 warpgroup, u32 thread)
      : arguments_(arguments),
        turn_(turn),
        feature_(feature),
        token_(token),
        warpgroup_(warpgroup),
        thread_(thread) {}

  // `up` are the sums of the second weight of a gated product.
  __device__ __forceinline__ void write(const Sums& gate, [[maybe_unused]] const Sums& up) const {
    // before the first feature as well as behind the last there is nothing to write
    const u32 feature = static_cast<u32>(feature_ + static_cast<int>(thread_ % vectors * vector));
    const bool inside = feature < arguments_.features;
#pragma unroll
    for (u32 first = 0; first < configuration.tokens; first += L::turn_tokens) {
      if (first >= arguments_.cta_tokens) break;
      ptx::named_barrier(1 + warpgroup_, tile::warpgroup_threads);
      put(gate, first, turn_);
      if constexpr (configuration.gated) put(up, first, turn_ + L::turn_elements);
      ptx::named_barrier(1 + warpgroup_, tile::warpgroup_threads);
#pragma unroll 1
      for (u32 row = thread_ / vectors; row < L::turn_tokens; row += tokens_at_once) {
        const u32 token = token_ + first + row;
        if (!inside || first + row >= arguments_.cta_tokens || token >= arguments_.tokens) break;
        finish(row, token, feature);
      }
    }
  }

 private:
  // Fragments of the tokens from `first` on; the pitch keeps the threads of a warp on different banks.
  __device__ __forceinline__ void put(const Sums& sums, u32 first, float* turn) const {
    const u32 lane = thread_ % 32;
    float* place = turn + lane % 4 * 2 * L::turn_pitch + thread_ / 32 * 16 + lane / 4;
#pragma unroll
    for (u32 r = 0; r < L::turn_tokens / 2; r += 4) {
      float* column = place + r * 2 * L::turn_pitch;
      column[0] = sums.sums[first / 2 + r];
      column[L::turn_pitch] = sums.sums[first / 2 + r + 1];
      column[8] = sums.sums[first / 2 + r + 2];
      column[L::turn_pitch + 8] = sums.sums[first / 2 + r + 3];
    }
  }

  __device__ __forceinline__ void finish(u32 row, u32 token, u32 feature) const {
    float values[vector];
    get(values, row, 0);
    add(values, arguments_.weights[0].bias, feature);
    activate_all(values);
    if constexpr (configuration.gated) {
      float up[vector];
      get(up, row, L::turn_elements);
      add(up, arguments_.weights[1].bias, feature);
#pragma unroll
      for (u32 i = 0; i < vector; ++i) values[i] *= up[i];
    }
    add(values, arguments_.residual, token * arguments_.residual_stride + feature);
    uint4 packed;
    packed.x = ptx::pack<configuration.half>(values[0], values[1]);
    packed.y = ptx::pack<configuration.half>(values[2], values[3]);
    packed.z = ptx::pack<configuration.half>(values[4], values[5]);
    packed.w = ptx::pack<configuration.half>(values[6], values[7]);
    u16* out = static_cast<u16*>(arguments_.out) + token * arguments_.out_stride + feature;
    *reinterpret_cast<uint4*>(out) = packed;
  }

  __device__ __forceinline__ void get(float (&values)[vector], u32 row, u32 offset) const {
    const float4* place = reinterpret_cast<const float4*>(
        turn_ + offset + row * L::turn_pitch + thread_ % vectors * vector);
    const float4 low = place[0];
    const float4 high = place[1];
    values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
    values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
  }

  // Eight elements from `index` on, aligned to 16 bytes; nothing for null.
  __device__ __forceinline__ static void add(float (&values)[vector], const void* base, u64 index) {
    if (base == nullptr) return;
    const u16* source = static_cast<const u16*>(base) + index;
    const uint4 packed = __ldg(reinterpret_cast<const uint4*>(source));
    const u32 words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      values[2 * i] += ptx::unpack<configuration.half>(static_cast<u16>(words[i]));
      values[2 * i + 1] += ptx::unpack<configuration.half>(static_cast<u16>(words[i] >> 16));
    }
  }

  __device__ __forceinline__ void activate_all(float (&values)[vector]) const {
    switch (arguments_.activation) {
      case Activation::silu:
        return each<Activation::silu>(values);
      case Activation::gelu:
        return each<Activation::gelu>(values);
      case Activation::gelu_tanh:
        return each<Activation::gelu_tanh>(values);
      case Activation::none:
        return;
    }
  }

  template <Activation activation>
  __device__ __forceinline__ static void each(float (&values)[vector]) {
#pragma unroll
    for (u32 i = 0; i < vector; ++i) values[i] = activate<activation>(values[i]);
  }

  const Arguments& arguments_;
  float* const turn_;
  const int feature_;
  const u32 token_;
  const u32 warpgroup_;
  const u32 thread_;
};

}  // namespace dak::linear
