// A CTA that keeps a fixed number of pieces of a range in flight into shared memory.
#pragma once

#include "pipeline/ring.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/mbarrier.cuh"
#include "types.cuh"

namespace dak::pipeline {

// Shared memory of a ring: the barriers, then the pieces from byte `barrier_bytes` on.
constexpr u32 maximum_stages = 32;
constexpr u32 barrier_bytes = 256;
static_assert(maximum_stages * sizeof(ptx::mbarrier_t) <= barrier_bytes);

// Walks pieces `first, first + step, ...` of `pieces`, from the start again after the last.
struct PieceWalk {
  const u8* address;
  u32 piece_bytes;
  u32 pieces;
  u32 step;
  u32 next;

  __device__ __forceinline__ const u8* take() {
    const u8* piece = address + static_cast<u64>(next) * piece_bytes;
    next += step;
    // step <= pieces is checked before the launch, so one subtraction wraps
    if (next >= pieces) next -= pieces;
    return piece;
  }
};

// Used by one thread, except `wait`, which any thread may call.
struct BulkReader {
  ptx::mbarrier_t* full;
  u8* pieces;
  u32 piece_bytes;
  u32 stages;

  __device__ __forceinline__ BulkReader(u8* shared, u32 piece_bytes, u32 stages)
      : full(reinterpret_cast<ptx::mbarrier_t*>(shared)),
        pieces(shared + barrier_bytes),
        piece_bytes(piece_bytes),
        stages(stages) {}

  __device__ __forceinline__ void initialise() const {
    for (u32 stage = 0; stage < stages; ++stage) ptx::mbarrier_init(full + stage, 1);
    ptx::fence_mbarrier_init();
  }

  __device__ __forceinline__ u8* piece(u32 stage) const { return pieces + stage * piece_bytes; }

  __device__ __forceinline__ void issue(u32 stage, const u8* global) const {
    ptx::mbarrier_arrive_expect_tx(full + stage, piece_bytes);
    ptx::bulk_load(piece(stage), global, piece_bytes, full + stage);
  }

  __device__ __forceinline__ void wait(RingPosition position) const {
    while (!ptx::mbarrier_try_wait_parity(full + position.stage, position.parity)) {
    }
  }
};

}  // namespace dak::pipeline
