// Delays of remote copies, from issue to arrival, as the thread sees them that issues and waits.
//
// A delay counts only where the thread was waiting when the copy arrived: who comes later does not know
// when that was, and bytes that wait for a busy consumer say nothing about the link. A worker that came
// later most of the time has waited for the slowest copies alone. It reports apart from the others.
// That may be every worker: copies that are asked for together, all that one has in flight, arrive
// together, and it waits for the first of them.
#pragma once

#include "types.cuh"
#include "window/law.cuh"
#include "window/record.cuh"

namespace dak::window {

constexpr u32 untimed = 0;  // a mark of copies that are not to be counted

class Delays {
 public:
  // For a copy issued now. `now`: the SM's clock.
  static __device__ __forceinline__ u32 mark(u32 now) { return now | 1; }

  // A copy with that mark has just arrived.
  __device__ __forceinline__ void arrived(u32 mark, u32 now) {
    if (mark == untimed) return;
    const u32 delay = now - mark;
    sum_ += delay;
    ++count_;
    if (delay < least_) least_ = delay;
  }

  // A copy with that mark was there already.
  __device__ __forceinline__ void missed(u32 mark) {
    if (mark != untimed) ++missed_;
  }

  // Adds what this thread saw to the link's record, and updates the window where that is due. At the end
  // of a worker: an update takes four round trips to L2. `window`: that of the launch, with its tag.
  __device__ __forceinline__ void report(Record* link, u32 window, u32 in_flight, u64 time) const {
    if (count_ == 0) return;
    const bool late = count_ <= missed_;
    const u32 next = __ldcg(&link->next);
    const u32 usual = __ldcg(&link->state.kept) > 0 ? dip_samples : usual_samples;
    const u32 wanted = late ? late_samples * usual : usual;
    if (next != window) return;  // the launch started before the last change
    Sums& sums = (late ? link->late : link->sums)[window & 1];
    atomicMax(&sums.least, ~least_);
    atomicMax(&sums.in_flight, in_flight);
    const u64 own = static_cast<u64>(count_) << count_shift | sum_;
    const u64 all = atomicAdd(&sums.delays, own) + own;
    if (all >> count_shift < wanted || atomicCAS(&link->lock, 0, 1) != 0) return;
    __threadfence();
    if (__ldcg(&link->next) == window) step(link, sums, window, wanted, time, late);
    __threadfence();
    atomicExch(&link->lock, 0);
  }

 private:
  // Who holds the lock.
  static __device__ __forceinline__ void step(Record* link, Sums& sums, u32 window, u32 wanted,
                                              u64 time, bool late) {
    const u64 delays = atomicExch(&sums.delays, 0ull);
    const u32 least = ~atomicExch(&sums.least, 0);
    const u32 in_flight = atomicExch(&sums.in_flight, 0);
    State state{window / tags * tags,
                __ldcg(&link->state.least),
                __ldcg(&link->state.age),
                __ldcg(&link->state.kept),
                __ldcg(&link->state.kept_in_flight),
                __ldcg(&link->state.kept_delay),
                __ldcg(&link->state.rate),
                __ldcg(&link->state.slower)};
    const Limits limits{__ldcg(&link->limits.floor), __ldcg(&link->limits.cap)};
    const u32 count = static_cast<u32>(delays >> count_shift);
    // another took them, or what came before the delays is not there yet
    if (count < wanted || in_flight == 0) return;
    const u64 cycles = delays & ((1ull << count_shift) - 1);
    const float mean = __fdividef(static_cast<float>(cycles), static_cast<float>(count));
    // who has added its least and not yet its delays may have had it taken already
    const Measured measured{mean, smaller(least, static_cast<u32>(mean)), in_flight, late};
    const u32 known = state.least;
    const Cause cause = update(state, limits, measured);
    const u32 number = __ldcg(&link->updates) + 1;
    __stcg(&link->updates, number);
    __stcg(&link->state.window, state.window);
    __stcg(&link->state.least, state.least);
    __stcg(&link->state.age, state.age);
    __stcg(&link->state.kept, state.kept);
    __stcg(&link->state.kept_in_flight, state.kept_in_flight);
    __stcg(&link->state.kept_delay, state.kept_delay);
    __stcg(&link->state.rate, state.rate);
    __stcg(&link->state.slower, state.slower);
    if (!late) clear(link->late[window & 1]);  // while there are better ones
    const bool changed = state.window != window / tags * tags;
    if (changed || state.least != known) {
      const u32 changes = __ldcg(&link->changes);
      Change& place = link->history[changes % history_length];
      __stcg(&place.time, time);
      __stcg(&place.number, number);
      __stcg(&place.window, state.window);
      __stcg(&place.delay, measured.delay);
      __stcg(&place.least, state.least);
      __stcg(&place.in_flight, in_flight);
      __stcg(&place.cause, static_cast<u32>(cause));
      __stcg(&link->changes, changes + 1);
    }
    if (!changed) return;
    const u32 tag = (window + 1) % tags;
    clear(link->sums[tag & 1]);
    clear(link->late[tag & 1]);
    __threadfence();
    __stcg(&link->next, state.window | tag);
  }

  static __device__ __forceinline__ void clear(Sums& sums) {
    __stcg(&sums.delays, 0ull);
    __stcg(&sums.least, 0u);
    __stcg(&sums.in_flight, 0u);
  }

  u64 sum_ = 0;
  u32 count_ = 0;
  u32 missed_ = 0;
  u32 least_ = ~0u;
};

}  // namespace dak::window
