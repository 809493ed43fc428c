// Sums of tiles that several workers share, by way of device memory.
//
// A worker that starts within a tile puts its sums into a slot and raises the slot's flag. The worker
// of the tile's first piece waits for the flags, lowers them and adds the slots in their order.
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

// Used by all threads of one warpgroup.
template <TieredLinearConfiguration configuration>
struct PartialSums {
  using L = Layout<configuration>;
  using Sums = tile::Accumulator<configuration.tokens>;
  static constexpr u32 blocks = configuration.blocks;

  const Arguments& arguments;
  u32 rank;
  u32 ctas;
  u32 warpgroup;
  u32 thread;

  __device__ __forceinline__ void publish(const Sums (&sums)[blocks], u32 slot) const {
#pragma unroll
    for (u32 block = 0; block < blocks; ++block) sums[block].store(place(slot, block), thread);
    synchronize();
    if (thread == 0) ptx::store_release_gpu(flag(slot), 1);
  }

  // For this warpgroup itself: each thread adds again what it kept.
  __device__ __forceinline__ void keep(const Sums (&sums)[blocks], u32 slot) const {
#pragma unroll
    for (u32 block = 0; block < blocks; ++block) sums[block].store(place(slot, block), thread);
  }

  __device__ __forceinline__ void add_kept(Sums (&sums)[blocks], u32 slot) const {
#pragma unroll
    for (u32 block = 0; block < blocks; ++block) sums[block].add(place(slot, block), thread);
  }

  // Adds `count` slots from `first` on.
  __device__ __forceinline__ void collect(Sums (&sums)[blocks], u32 first, u32 count) const {
    for (u32 i = thread; i < count; i += tile::warpgroup_threads) {
      wait_for(flag(first + i));
      *flag(first + i) = 0;
    }
    synchronize();
    // latency counts where there is little to add
    constexpr int registers = Sums::registers * blocks;
    constexpr int at_once = registers < 16 ? 16 / registers : 1;
#pragma unroll at_once
    for (u32 i = 0; i < count; ++i) {
#pragma unroll
      for (u32 block = 0; block < blocks; ++block) sums[block].add(place(first + i, block), thread);
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
