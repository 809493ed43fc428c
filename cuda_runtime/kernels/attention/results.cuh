// Results of units that several workers share, by way of device memory.
//
// A worker puts what it has of a unit into a slot and counts itself in. The last to arrive sets the
// counter back and adds the slots up in their order, its own among them: who comes last has no part
// in the result, and nobody waits. Many slots are added up in groups first, each into its first slot
// by the last to arrive at the group: one warpgroup asks for 16 at a time, and waits for each round.
#pragma once

#include "attention/arguments.cuh"
#include "attention/layout.cuh"
#include "attention/queries.cuh"
#include "attention/slots.cuh"
#include "attention/softmax.cuh"
#include "attention/task.cuh"
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
  // Slots that are asked for before the first is used.
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

  // What a task starts from: nothing, or what this warpgroup put into its slot.
  __device__ __forceinline__ void begin(const Task& task, const QueryRows& rows,
                                        float (&sums)[registers],
                                        Softmax<L::tile>& softmax) const {
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      const u32 row = own_row() + 8 * i;
      const bool there = task.resumes && row < rows.count;
      float2 weight = make_float2(minus_infinity, 0.0f);
      if (there) weight = __ldcg(weight_at(task.slot, row));
      softmax.peak[i] = weight.x;
      softmax.sum[i] = thread_ % 4 == 0 ? weight.y : 0.0f;
      const float* place = sums_at(task.slot, row) + thread_ % 4 * 2;
#pragma unroll
      for (u32 r = 2 * i; r < registers; r += 4) {
        float2 pair = make_float2(0.0f, 0.0f);
        if (there) pair = __ldcg(reinterpret_cast<const float2*>(place + r / 4 * 8));
        sums[r] = pair.x;
        sums[r + 1] = pair.y;
      }
    }
  }

  // A part of it, which becomes the task's slot.
  __device__ __forceinline__ void put(const Task& task, const QueryRows& rows,
                                      const float (&sums)[registers],
                                      const Softmax<L::tile>& softmax) const {
    if (rows.count == 0) return;
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      const u32 row = own_row() + 8 * i;
      if (row >= rows.count) continue;
      float* place = sums_at(task.slot, row) + thread_ % 4 * 2;
#pragma unroll
      for (u32 r = 2 * i; r < registers; r += 4) {
        __stcg(reinterpret_cast<float2*>(place + r / 4 * 8), make_float2(sums[r], sums[r + 1]));
      }
      // by all four threads of a row: each reads what it wrote itself, if it takes the sums up again
      __stcg(weight_at(task.slot, row), make_float2(softmax.peak[i], softmax.sum[i]));
    }
    if (task.complete) add_up(task, rows);
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

  // fp32 elements.
  __device__ __forceinline__ u32 weights_size() const { return (2 * slot_rows_ + 3) / 4 * 4; }

  __device__ __forceinline__ float* slot_at(u32 slot) const {
    return arguments_.partials +
           static_cast<u64>(slot) * (slot_rows_ * L::head_dim + 2 * weights_size());
  }

  __device__ __forceinline__ float* sums_at(u32 slot, u32 row) const {
    return slot_at(slot) + (part_ * warpgroup_rows + row) * L::head_dim;
  }

  // The largest score of a row, in powers of 2, and its sum of powers: of a slot, or of the group
  // that is added up there. Others may still read the slot's own.
  __device__ __forceinline__ float2* weight_at(u32 slot, u32 row, bool group = false) const {
    float* weights =
        slot_at(slot) + slot_rows_ * L::head_dim + (group ? weights_size() : 0);
    return reinterpret_cast<float2*>(weights) + part_ * warpgroup_rows + row;
  }

  __device__ __forceinline__ void synchronize() const {
    ptx::named_barrier(1 + warpgroup_, warpgroup_threads);
  }

  // Of a unit, or of a slot behind those of all units.
  __device__ __forceinline__ u32* counter_of(u32 place) const {
    return arguments_.counters + 1 + place * L::warpgroups + part_;
  }

  __device__ __forceinline__ bool arrives_last(u32* counter, u32 pieces) const {
    synchronize();
    if (thread_ == 0) {
      // for the whole warpgroup: barriers hand on what is known on either side of them
      const bool last = ptx::add_acquire_release_gpu(counter, 1) + 1 == pieces;
      if (last) *counter = 0;
      head_.last[warpgroup_] = last;
    }
    synchronize();
    return head_.last[warpgroup_] != 0;
  }

  // Counts a slot in, and adds up what it completes: its group, then all groups of the unit.
  __device__ __forceinline__ void add_up(const Task& task, const QueryRows& rows) const {
    const u32 shift = task.slots.group_shift(arguments_.most_at_once);
    Members members = task.slots.group(task.slot, shift);
    u32 place = task.unit;
    if (!members.all) {
      const u32 units = arguments_.batch * arguments_.heads * arguments_.row_blocks;
      place = units + task.slots.at(members.first);
    }
#pragma unroll 1
    for (;;) {
      if (!arrives_last(counter_of(place), members.count)) return;
      combine(rows, task.slots, members, shift > 0 && members.all);
      if (members.all) return;
      members = task.slots.groups(shift);
      place = task.unit;
    }
  }

  // `groups`: the members have been added up in groups.
  __device__ __forceinline__ void combine(const QueryRows& rows, const Slots& slots,
                                          const Members& members, bool groups) const {
    const u32 count = members.count;
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
            const u32 slot = slots.at(members.first + (first + i) * members.step);
            weights[i] = __ldcg(weight_at(slot, row, groups));
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
      if (!members.all) {
        const u32 slot = slots.at(members.first);
        __stcg(reinterpret_cast<float4*>(sums_at(slot, row)) + vector, total);
        if (vector == 0) __stcg(weight_at(slot, row, true), make_float2(peak, sum));
        continue;
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
