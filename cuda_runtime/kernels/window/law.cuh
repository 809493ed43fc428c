// How the window of a link follows from the delays that kernels see on it. Arithmetic alone.
//
// A link that brings B bytes/s, each request after at least d0, has `window` = B * delay bytes in flight
// (Little's law). Below B * d0, its bandwidth-delay product, the delay is d0 and does not depend on the
// window. Above it the link is full and the delay grows with the window, so that
//
//     window * target * d0 / delay  =  target * B * d0
//
// whatever the window was: one step lands. Other traffic on the link, or a link that turns slow, lower
// the B that reads get, and the window with it.
//
// d0 cannot be seen while the link is full. So once in a while, and first of all, a few launches run
// under a small window: a dip. Their least delay is d0.
#pragma once

#include "types.cuh"

namespace dak::window {

// Of the bandwidth-delay product. On the H200 the host's link is full beside HBM reads from 2.2 on,
// and HBM loses nothing up to 5.
constexpr float target = 3.0f;
constexpr float hysteresis = 1.25f;  // a step by less is none
constexpr float most_growth = 4.0f;
constexpr float most_shrinking = 1.0f / 16.0f;
constexpr u32 worker = 32 * 1024;  // that one has in flight
constexpr u32 dip_share = 5;
constexpr u32 first_dip_share = 12;  // from any window: all a launch can have is a megabyte or more
constexpr u32 least_dip = 64 * 1024;  // two workers; one alone would hold up a large launch
constexpr u32 lifetime = 2048;  // updates after which d0 is measured anew: a dip costs about 5 launches
constexpr u32 aging = 4;  // d0 rises by a quarter at most at a dip: other traffic may have been there
constexpr float confirms = 1.05f;
constexpr u32 usual_samples = 64;  // that an update takes
constexpr u32 dip_samples = 16;    // and one that ends a dip
constexpr u32 tags = 16;  // windows are multiples of it; below is the tag of a launch's window

struct Limits {
  u32 floor;
  u32 cap;
};

// Delays in cycles of an SM.
struct State {
  u32 window;   // bytes
  u32 least;    // d0, or 0: not known yet
  u32 age;      // updates since it was seen
  u32 kept;     // the window before a dip, or 0: there is none
  u32 kept_in_flight;
  float kept_delay;
};

// What launches under the state's window saw.
struct Measured {
  float delay;    // mean
  u32 least;
  u32 in_flight;  // bytes that a launch permitted itself at most
};

enum class Cause : u32 { start, dip, law, hold };

__device__ __forceinline__ u32 bounded(float bytes, const Limits& limits) {
  const float most = static_cast<float>(limits.cap);
  const float least = static_cast<float>(limits.floor);
  const u32 found = bytes <= least  ? limits.floor
                    : bytes >= most ? limits.cap
                                    : static_cast<u32>(bytes);
  const u32 whole = found / tags * tags;
  return whole > tags ? whole : tags;
}

__device__ __forceinline__ u32 smaller(u32 a, u32 b) { return a < b ? a : b; }

// The window after one of which so many bytes were in flight with that mean delay.
__device__ __forceinline__ u32 aim(u32 window, u32 in_flight, float delay, float least,
                                   const Limits& limits) {
  float factor = __fdividef(target * least, delay);
  if (factor > most_growth) factor = most_growth;
  if (factor < most_shrinking) factor = most_shrinking;
  // Launches that have little to read, or for whose last part no worker was whole, use less than the
  // window. What they saw holds for what was in flight.
  const u32 used = smaller(window, factor > 1.0f ? in_flight + worker : in_flight);
  const float now = static_cast<float>(window);
  const float found = static_cast<float>(used) * factor;
  const bool grows = factor >= hysteresis && found > now * hysteresis;
  const bool shrinks = factor * hysteresis <= 1.0f && found * hysteresis < now;
  return bounded(grows || shrinks ? found : now, limits);
}

__device__ __forceinline__ u32 dip_of(u32 in_flight, bool starts) {
  const u32 share = in_flight / (starts ? first_dip_share : dip_share) / tags * tags;
  return share > least_dip ? share : least_dip;
}

__device__ __forceinline__ Cause update(State& state, const Limits& limits,
                                        const Measured& measured) {
  const u32 in_flight = smaller(state.window, measured.in_flight);
  const bool starts = state.least == 0;
  if (state.kept > 0) {
    const u32 rise = smaller(state.least / aging, ~0u - state.least);
    state.least = smaller(measured.least, state.least + rise);
    state.age = 0;
    state.window = aim(state.kept, state.kept_in_flight, state.kept_delay,
                       static_cast<float>(state.least), limits);
    state.kept = 0;
    return Cause::law;
  }
  if (starts || measured.least < state.least) {
    state.least = measured.least > 0 ? measured.least : 1;
    state.age = 0;
  } else if (static_cast<float>(measured.least) <= confirms * static_cast<float>(state.least)) {
    state.age = 0;
  } else {
    ++state.age;
  }
  const bool small = state.window <= limits.floor || state.window <= least_dip;
  if (starts && small) {  // hardly enough to fill the link
    state.window = bounded(most_growth * static_cast<float>(state.window), limits);
    state.age = lifetime - usual_samples;
    return Cause::start;
  }
  const u32 dip = dip_of(in_flight, starts);
  if ((starts || state.age >= lifetime) && dip < state.window) {
    state.kept = state.window;
    state.kept_in_flight = in_flight;
    state.kept_delay = measured.delay;
    state.window = dip;
    return Cause::dip;
  }
  const u32 before = state.window;
  state.window =
      aim(before, in_flight, measured.delay, static_cast<float>(state.least), limits);
  return state.window == before ? Cause::hold : starts ? Cause::start : Cause::law;
}

}  // namespace dak::window
