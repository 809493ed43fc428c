// Sums of tiles that several workers share, by way of device memory.
//
// A worker that starts within a tile puts its sums into a slot and raises the slot's flag. The worker
// of the tile's first piece waits for the flags, lowers them and adds the slots in their order.
//
// Nobody waits for pieces of the tail: the flag of the tile's first piece counts them, and whoever
// finds all there sets it back and adds all slots up, its own among them, in their order.
#pragma once

#include "linear/arguments.cuh"
#include "linear/layout.cuh"
#include "pipeline/wait.cuh"
#include "ptx/memory_order.cuh"
#include "ptx/timer.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/accumulator.cuh"
#include "types.cuh"

namespace dak::linear {

struct SlotRange {
  u32 first;
  u32 count;
};

// Used by all threads of one warpgroup.
template <TieredLinearConfiguration configuration>
struct PartialSums {
  using L = Layout<configuration>;
  using Sums = tile::Accumulator<configuration.tokens>;
  static constexpr u32 blocks = configuration.blocks;
  // Slots that are asked for before the first of them is added: where there is little to add, latency
  // is all that counts.
  static constexpr u32 registers = Sums::registers * blocks;
  static constexpr u32 registers_at_once = configuration.ctas_per_sm == 1 ? 64 : 16;
  static constexpr u32 at_once = registers < registers_at_once ? registers_at_once / registers : 1;

  const Arguments& arguments;
  u32 rank;
  u32 ctas;
  u32 warpgroup;
  u32 thread;

  // Each thread may add again at once what it stored; others only after `publish` or `arrives_last`.
  __device__ __forceinline__ void store(const Sums (&sums)[blocks], u32 slot) const {
#pragma unroll
    for (u32 block = 0; block < blocks; ++block) sums[block].store(place(slot, block), thread);
  }

  __device__ __forceinline__ void publish(u32 slot) const {
    synchronize();
    if (thread == 0) ptx::store_release_gpu(flag(slot), 1);
  }

  // Whether the last of these slots to be stored is that of this warpgroup.
  __device__ __forceinline__ bool arrives_last(const SlotRange& slots) const {
    synchronize();
    bool last = false;
    if (thread == 0) {
      u32* arrived = flag(slots.first);
      last = ptx::add_acquire_release_gpu(arrived, 1) + 1 == slots.count;
      if (last) *arrived = 0;
    }
    return ptx::named_barrier_or(1 + warpgroup, tile::warpgroup_threads, last);
  }

  __device__ __forceinline__ void add_kept(Sums (&sums)[blocks], u32 slot) const {
#pragma unroll
    for (u32 block = 0; block < blocks; ++block) sums[block].add(place(slot, block), thread);
  }

  // Waits until they have been published.
  __device__ __forceinline__ void await(const SlotRange& slots) const {
    for (u32 i = thread; i < slots.count; i += tile::warpgroup_threads) {
      wait_for(flag(slots.first + i));
      *flag(slots.first + i) = 0;
    }
    synchronize();
  }

  __device__ __forceinline__ void add(Sums (&sums)[blocks], const SlotRange& slots) const {
    if constexpr (at_once == 1) {
#pragma unroll 1
      for (u32 i = 0; i < slots.count; ++i) add_kept(sums, slots.first + i);
    } else {
#pragma unroll 1
      for (u32 i = 0; i < slots.count; i += at_once) {
        Sums parts[at_once][blocks];
#pragma unroll
        for (u32 j = 0; j < at_once; ++j) {
#pragma unroll
          for (u32 block = 0; block < blocks; ++block) {
            parts[j][block].clear();
            if (i + j < slots.count) {
              parts[j][block].load(place(slots.first + i + j, block), thread);
            }
          }
        }
#pragma unroll
        for (u32 j = 0; j < at_once; ++j) {
#pragma unroll
          for (u32 block = 0; block < blocks; ++block) sums[block].add(parts[j][block]);
        }
      }
    }
  }

 private:
  __device__ __forceinline__ void synchronize() const {
    ptx::named_barrier(1 + warpgroup, tile::warpgroup_threads);
  }

  __device__ __forceinline__ u32* flag(u32 slot) const {
    return arguments.flags + (slot * ctas + rank) * consumer_warpgroups + warpgroup;
  }

  __device__ __forceinline__ float* place(u32 slot, u32 block) const {
    const u64 first = static_cast<u64>(slot * ctas + rank) * L::partial_elements;
    return arguments.partials + first + (warpgroup * blocks + block) * Sums::elements;
  }

  __device__ __forceinline__ void wait_for(const u32* flag) const {
    [[maybe_unused]] u64 deadline = 0;
    if constexpr (configuration.bounded_waits) {
      deadline = ptx::globaltimer() + pipeline::bounded_wait_nanoseconds;
    }
    while (ptx::load_acquire_gpu(flag) == 0) {
      if constexpr (configuration.bounded_waits) {
        if (ptx::globaltimer() > deadline) {
          printf("dak: CTA %u, thread %u: partial sums never came\n", blockIdx.x, threadIdx.x);
          __trap();
        }
      }
    }
  }
};

}  // namespace dak::linear
