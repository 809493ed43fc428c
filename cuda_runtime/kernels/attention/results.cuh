// Results of units that several workers share, by way of device memory.
//
// A worker puts what it has of a unit into a slot and counts itself in. The last to arrive sets the
// counter back and adds the slots up in their order, its own among them: who comes last has no part
// in the result, and nobody waits.
#pragma once

#include "attention/arguments.cuh"
#include "attention/layout.cuh"
#include "attention/queries.cuh"
#include "attention/slots.cuh"
#include "attention/softmax.cuh"
#include "ptx/convert.cuh"
#include "ptx/exponent.cuh"
#include "ptx/memory_order.cuh"
#include "ptx/warpgroup.cuh"
#include "types.cuh"

namespace dak::attention {

// Used by all threads of one warpgroup.
template <TieredAttentionConfiguration configuration>
class Results {
  using L = Layout<configuration>;
  static constexpr u32 registers = L::head_dim / 2;
  static constexpr u32 vectors = L::head_dim / 4;
  // Slots that are asked for before the first is used: one sequence on all SMs leaves 36 to a unit.
  static constexpr u32 at_once = 16;

 public:
  // `part`: the warpgroup's place among those of its team.
  __device__ __forceinline__ Results(const Arguments& arguments, Head& head, u32 part,
                                     u32 warpgroup, u32 thread)
      : arguments_(arguments),
        head_(head),
        part_(part),
        warpgroup_(warpgroup),
        thread_(thread),
        slot_rows_(min(L::rows, arguments.ratio * arguments.queries)) {}

  // The whole result of a unit.
  __device__ __forceinline__ void write(const QueryRows& rows, const float (&sums)[registers],
                                        const Softmax<L::tile>& softmax) const {
    const float inverse[2] = {inverse_of(softmax.sum[0]), inverse_of(softmax.sum[1])};
    u16* out = static_cast<u16*>(arguments_.out);
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      const u32 row = own_row() + 8 * i;
      if (row >= rows.count) continue;
      u16* place = out + rows.out_place(arguments_, row, L::head_dim) + thread_ % 4 * 2;
#pragma unroll
      for (u32 r = 2 * i; r < registers; r += 4) {
        *reinterpret_cast<u32*>(place + r / 4 * 8) = ptx::pack<configuration.half>(
            sums[r] * inverse[i], sums[r + 1] * inverse[i]);
      }
    }
  }

  // A part of it, which becomes slot `slot`.
  __device__ __forceinline__ void publish(const QueryRows& rows, const float (&sums)[registers],
                                          const Softmax<L::tile>& softmax, u32 slot, u32 unit,
                                          const Slots& slots) const {
    if (rows.count == 0) return;
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      const u32 row = own_row() + 8 * i;
      if (row >= rows.count) continue;
      float* place = sums_at(slot, row) + thread_ % 4 * 2;
#pragma unroll
      for (u32 r = 2 * i; r < registers; r += 4) {
        __stcg(reinterpret_cast<float2*>(place + r / 4 * 8), make_float2(sums[r], sums[r + 1]));
      }
      if (thread_ % 4 == 0) {
        __stcg(weight_at(slot, row), make_float2(softmax.peak[i], softmax.sum[i]));
      }
    }
    if (arrives_last(unit, slots.total())) combine(rows, slots);
  }

  // Writes 0 for a sequence of which nothing is read.
  __device__ __forceinline__ void blank(u32 sequence) const {
    const u64 vectors_of_sequence = static_cast<u64>(arguments_.queries) * arguments_.heads *
                                    arguments_.ratio * L::chunks;
    uint4* out = static_cast<uint4*>(arguments_.out) + sequence * vectors_of_sequence;
    for (u64 i = thread_; i < vectors_of_sequence; i += warpgroup_threads) {
      out[i] = make_uint4(0, 0, 0, 0);
    }
  }

 private:
  __device__ __forceinline__ u32 own_row() const {
    return thread_ / 32 * 16 + thread_ % 32 / 4;
  }

  // A row that sees nothing is 0.
  static __device__ __forceinline__ float inverse_of(float sum) {
    return sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
  }

  __device__ __forceinline__ float* slot_at(u32 slot) const {
    const u32 weights = (2 * slot_rows_ + 3) / 4 * 4;
    return arguments_.partials + static_cast<u64>(slot) * (slot_rows_ * L::head_dim + weights);
  }

  __device__ __forceinline__ float* sums_at(u32 slot, u32 row) const {
    return slot_at(slot) + (part_ * warpgroup_rows + row) * L::head_dim;
  }

  // The largest score of a row, in powers of 2, and its sum of powers.
  __device__ __forceinline__ float2* weight_at(u32 slot, u32 row) const {
    float* weights = slot_at(slot) + slot_rows_ * L::head_dim;
    return reinterpret_cast<float2*>(weights) + part_ * warpgroup_rows + row;
  }

  __device__ __forceinline__ void synchronize() const {
    ptx::named_barrier(1 + warpgroup_, warpgroup_threads);
  }

  __device__ __forceinline__ bool arrives_last(u32 unit, u32 pieces) const {
    synchronize();
    if (thread_ == 0) {
      // for the whole warpgroup: barriers hand on what is known on either side of them
      u32* counter = arguments_.counters + 1 + unit * L::warpgroups + part_;
      const bool last = ptx::add_acquire_release_gpu(counter, 1) + 1 == pieces;
      if (last) *counter = 0;
      head_.last[warpgroup_] = last;
    }
    synchronize();
    return head_.last[warpgroup_] != 0;
  }

  __device__ __forceinline__ void combine(const QueryRows& rows, const Slots& slots) const {
    const u32 count = slots.total();
    for (u32 item = thread_; item < rows.count * vectors; item += warpgroup_threads) {
      const u32 row = item / vectors;
      const u32 vector = item % vectors;
      float peak = minus_infinity;
      float sum = 0.0f;
      float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
      for (u32 first = 0; first < count; first += at_once) {
        float2 weights[at_once];
        float4 parts[at_once];
#pragma unroll
        for (u32 i = 0; i < at_once; ++i) {
          weights[i] = make_float2(minus_infinity, 0.0f);
          parts[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
          if (first + i < count) {
            const u32 slot = slots.at(first + i);
            weights[i] = __ldcg(weight_at(slot, row));
            parts[i] = __ldcg(reinterpret_cast<const float4*>(sums_at(slot, row)) + vector);
          }
        }
        // of all at once, and scaled apart: one after the other they would wait for each power
        float highest = peak;
#pragma unroll
        for (u32 i = 0; i < at_once; ++i) highest = fmaxf(highest, weights[i].x);
        const float shift = highest == minus_infinity ? 0.0f : highest;
        const float before = ptx::exp2_approximate(peak - shift);
        peak = highest;
        sum *= before;
        total = make_float4(total.x * before, total.y * before, total.z * before,
                            total.w * before);
#pragma unroll
        for (u32 i = 0; i < at_once; ++i) {
          const float now = ptx::exp2_approximate(weights[i].x - shift);
          sum += weights[i].y * now;
          total.x += parts[i].x * now;
          total.y += parts[i].y * now;
          total.z += parts[i].z * now;
          total.w += parts[i].w * now;
        }
      }
      const float inverse = inverse_of(sum);
      uint2 packed;
      packed.x = ptx::pack<configuration.half>(total.x * inverse, total.y * inverse);
      packed.y = ptx::pack<configuration.half>(total.z * inverse, total.w * inverse);
      u16* out = static_cast<u16*>(arguments_.out) +
                 rows.out_place(arguments_, row, L::head_dim) + vector * 4;
      *reinterpret_cast<uint2*>(out) = packed;
    }
  }

  const Arguments& arguments_;
  Head& head_;
  const u32 part_;
  const u32 warpgroup_;
  const u32 thread_;
  const u32 slot_rows_;
};

}  // namespace dak::attention
