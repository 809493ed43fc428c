// Words of device memory by which a streamer of a ring and the gates ahead of products tell each
// other what has arrived and what has been read.
#pragma once

#include "ptx/memory_order.cuh"
#include "ptx/timer.cuh"
#include "types.cuh"

namespace dak::ring_words {

// harness/ring_words.py has the same. The first two are on lines of their own: all CTAs poll them.
constexpr u32 given_up = 0;     // 0, or who gave up: stays from replay to replay
constexpr u32 parts_read = 32;  // from here on all are zero when a graph begins
constexpr u32 arrivals = 64;    // CTAs whose share of a part has arrived, by part

constexpr u32 by_streamer = 1u << 31;  // in `given_up`, besides the number of the part plus one

// Waits until `words[index]` is at least `least`. False once anybody has given up, and after
// `patience` ns, when `who` is left in `given_up`.
__device__ __forceinline__ bool wait(u32* words, u32 index, u32 least, u64 patience, u32 who) {
  if (ptx::load_acquire_gpu(words + index) >= least) return true;
  const u64 deadline = ptx::globaltimer() + patience;
  while (ptx::load_acquire_gpu(words + index) < least) {
    if (ptx::load_acquire_gpu(words + given_up) != 0) return false;
    if (ptx::globaltimer() > deadline) {
      ptx::store_release_gpu(words + given_up, who);
      return false;
    }
  }
  return true;
}

}  // namespace dak::ring_words
