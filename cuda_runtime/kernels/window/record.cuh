// What the runtime keeps of a link in device memory (cuda_runtime/window.py has the same layout).
#pragma once

#include "types.cuh"
#include "window/law.cuh"

namespace dak::window {

constexpr u32 history_length = 256;  // the last changes

// One change of the window.
struct Change {
  u64 time;        // globaltimer, ns
  u32 number;      // of the update, from 1
  u32 window;      // from here on
  float delay;     // before it, cycles
  u32 least;       // cycles
  u32 in_flight;   // bytes
  u32 cause;       // window::Cause
};
static_assert(sizeof(Change) == 32);

// What launches under one window saw, since the last update.
struct Sums {
  u64 delays;     // cycles, and in the upper bits how many
  u32 least;      // its complement, so that 0 is none
  u32 in_flight;  // bytes
};
constexpr u32 count_shift = 44;

struct Record {
  // The host's. A launch under a fixed window, and kernels of other make, read the first word.
  u32 window;
  u32 automatic;  // 1: launches take the window that the last one of their stream left for them
  Limits limits;
  u32 padding[28];
  // Kernels'.
  u32 next;  // the window of launches to come, and its tag
  u32 lock;
  u32 updates;
  u32 changes;
  State state;
  Sums sums[2];  // of windows with even and odd tags
  Sums late[2];  // by workers that came late for most copies
  u32 more[4];
  Change history[history_length];
};
static_assert(sizeof(Record) == 128 + 128 + history_length * sizeof(Change));

// The window of the launches of one stream, or of one stream's part of a captured graph. Zero at first.
struct LaunchWindow {
  u32 window;   // 0: none was left yet
  u32 readers;  // CTAs of the launch that starts; zero again when all have read
};
static_assert(sizeof(LaunchWindow) == 8);

}  // namespace dak::window
