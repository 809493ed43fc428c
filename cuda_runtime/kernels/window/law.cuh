// How the window of a link follows from the delays that kernels see on it. Arithmetic alone.
//
// A link that brings B bytes/s, each request after at least d0, has `window` = B * delay bytes in flight
// (Little's law). Below B * d0, its bandwidth-delay product, the delay is d0 and does not depend on the
// window. Above it the link is full and the delay grows with the window, so that
//
//     window * target * d0 / delay  =  target * B * d0
//
// whatever the window was: one step lands.
//
// Other traffic on the link lowers the B that reads get. A window that followed it would give way to
// who gives nothing back, and get less for it: so windows shrink to what the best B of late needs, and
// follow a link that is slower only once it has been so for long. Until then as many bytes are in flight
// as before, within the knee.
//
// Workers that came late for most of their copies know the delays of the slowest alone. The mean of
// those is no less than that of all, so it may tell a window to grow, and never to shrink.
//
// d0 cannot be seen while the link is full. So once in a while, and first of all, a few launches run
// under a small window: a dip. Their least delay is d0.
#pragma once

#include "types.cuh"

namespace dak::window {

// Of the bandwidth-delay product, 77 KB for the host's link of the H200. There a target of 3 gave
// windows of 280 KB (what launches permit themselves is more than what is in flight) and 98.6% of the
// best link rate. Fixed windows of 200, 400 and 600 KB have 96.4, 99.1 and 99.9% of it, and up to 600
// HBM loses nothing; beside a copy, what HBM bounds is fastest at 400 KB.
constexpr float target = 4.0f;
constexpr float hysteresis = 1.25f;  // a step by less is none
constexpr float full = 2.0f;  // a link with delays of so many d0 is full
constexpr float most_growth = 4.0f;
constexpr float most_shrinking = 1.0f / 16.0f;
constexpr u32 worker = 32 * 1024;  // that one has in flight
constexpr u32 dip_share = 5;
constexpr u32 first_dip_share = 12;  // from any window: all a launch can have is a megabyte or more
constexpr u32 least_dip = 64 * 1024;  // two workers; one alone would hold up a large launch
// updates after which d0 is measured anew, a dip costs about 5 launches; and after which a link that
// brings less is a slower link: a copy of 1 GB takes 180
constexpr u32 lifetime = 2048;
constexpr u32 aging = 4;  // d0 rises by a quarter at most at a dip: other traffic may have been there
constexpr float confirms = 1.05f;
constexpr u32 usual_samples = 64;  // that an update takes
constexpr u32 dip_samples = 16;    // and one that ends a dip
constexpr u32 late_samples = 4;    // times as many from those who came late, so that others are first
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
  float rate;  // B, the best of late, bytes a cycle
  u32 slower;  // updates since the link brought about as much
};

// What launches under the state's window saw.
struct Measured {
  float delay;    // mean
  u32 least;
  u32 in_flight;  // bytes that a launch permitted itself at most
  u32 late;       // 1: by workers that came late for most copies, the delays are of the slowest
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
__device__ __forceinline__ u32 aim(u32 window, u32 in_flight, float delay, const State& state,
                                   const Limits& limits, bool may_shrink) {
  const float least = static_cast<float>(state.least);
  const float factor = __fdividef(target * least, delay);
  const float now = static_cast<float>(window);
  float found = now;
  if (factor >= hysteresis) {
    // Launches that have little to read, or for whose last part no worker was whole, use less than the
    // window. What they saw holds for what was in flight.
    const u32 used = smaller(window, in_flight + worker);
    const float grown = static_cast<float>(used) * (factor > most_growth ? most_growth : factor);
    if (grown > now * hysteresis) found = grown;
  } else if (may_shrink && factor * hysteresis <= 1.0f) {
    float shrunk = target * state.rate * least;
    if (shrunk < now * most_shrinking) shrunk = now * most_shrinking;
    if (shrunk * hysteresis < now) found = shrunk;
  }
  return bounded(found, limits);
}

// Keeps the best rate of late. Launches that did not fill the link say nothing about it.
__device__ __forceinline__ void follow(State& state, u32 in_flight, float delay, bool late) {
  if (delay < full * static_cast<float>(state.least)) return;
  const float rate = __fdividef(static_cast<float>(in_flight), delay);
  if (rate * hysteresis >= state.rate) {
    if (rate > state.rate) state.rate = rate;
    state.slower = 0;
  } else if (!late && ++state.slower >= lifetime) {
    state.rate = rate;
    state.slower = 0;
  }
}

__device__ __forceinline__ u32 dip_of(u32 in_flight, bool starts) {
  const u32 share = in_flight / (starts ? first_dip_share : dip_share) / tags * tags;
  return share > least_dip ? share : least_dip;
}

__device__ __forceinline__ Cause update(State& state, const Limits& limits,
                                        const Measured& measured) {
  const u32 in_flight = smaller(state.window, measured.in_flight);
  const bool starts = state.least == 0;
  const bool late = measured.late > 0;
  const u32 seen = measured.least > 0 ? measured.least : 1;
  if (state.kept > 0) {
    const u32 rise = smaller(state.least / aging, ~0u - state.least);
    state.least = smaller(seen, state.least + rise);
    state.age = 0;
    follow(state, state.kept_in_flight, state.kept_delay, late);
    state.window =
        aim(state.kept, state.kept_in_flight, state.kept_delay, state, limits, !late);
    state.kept = 0;
    return Cause::law;
  }
  if (starts || seen < state.least) {
    state.least = seen;
    state.age = 0;
  } else if (static_cast<float>(seen) <= confirms * static_cast<float>(state.least)) {
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
  follow(state, in_flight, measured.delay, late);
  state.window = aim(before, in_flight, measured.delay, state, limits, !late);
  return state.window == before ? Cause::hold : starts ? Cause::start : Cause::law;
}

}  // namespace dak::window
