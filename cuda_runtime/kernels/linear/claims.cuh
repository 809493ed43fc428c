// The pieces of the tail that a worker takes.
//
// Claims are values of a word in device memory that is zero between launches. Each worker claims until
// it gets a value behind the last piece. So there are as many claims as pieces and workers, and the
// last of them takes the word back to zero.
#pragma once

#include "schedule/line.cuh"
#include "schedule/tail.cuh"
#include "types.cuh"

namespace dak::linear {

// Used by the producer, after the kernels before this one have ended: they use the same word.
class Claims {
 public:
  // Steps before the end of a piece at which the next is asked for. An answer takes about 1 us, two or
  // three steps; who asks earlier is bound to more work.
  static constexpr u32 ahead = 4;

  __device__ __forceinline__ Claims(const schedule::Tail& tail, u32* word, u32 workers)
      : total_(tail.total()), last_(tail.total() + workers - 1), word_(word) {}

  // Where to ask, in steps of which [begin, end) are left.
  static __device__ __forceinline__ u32 asks_at(u32 begin, u32 end) {
    return end - min(ahead, end - begin);
  }

  // Returns at once; the answer is waited for where it is used. (Of atomicAdd(_, 1) the compiler makes
  // one for all threads of a warp, and waits at once, to hand the values out.)
  __device__ __forceinline__ void ask() {
    if (total_ > 0) next_ = atomicInc(word_, last_);
  }

  // What was asked for last, or Tail::nothing: then there is nothing to ask for any more.
  __device__ __forceinline__ u32 take() const {
    return next_ < total_ ? next_ : schedule::Tail::nothing;
  }

 private:
  const u32 total_;
  const u32 last_;
  u32* const word_;
  u32 next_ = 0;
};

}  // namespace dak::linear
