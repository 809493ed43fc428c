// How all CTAs of a launch come to one window while others change it.
//
// Work is divided by the window, in each CTA anew, so all must read the same. They read a word that
// belongs to the launches of their stream. The last CTA to have read it puts the link's newest window
// there, for the next launch, and only then lets that launch start: a launch that overlaps this one
// waits until all CTAs of this one have said launch_dependents, or have ended.
#pragma once

#include "types.cuh"
#include "window/record.cuh"

namespace dak::window {

// What a launch runs under.
struct Reading {
  u32 window;      // bytes
  u32 controlled;  // the same where kernels change the window, or 0
};

// One thread. Both words are asked for at once. Without a word of its own a launch keeps to the host's
// window.
__device__ __forceinline__ Reading read(const Record* link, const LaunchWindow* launch) {
  const u64 host = __ldcg(reinterpret_cast<const u64*>(link));
  const u32 left = launch != nullptr ? __ldcg(&launch->window) : 0;
  const u32 window = static_cast<u32>(host);
  const bool automatic = launch != nullptr && host >> 32 != 0;
  const u32 found = automatic && left > 0 ? left : window;
  return {found, automatic ? found : 0};
}

// One thread of each of `ctas` CTAs, once its CTA has read and before it says launch_dependents.
__device__ __forceinline__ void end_reading(const Record* link, LaunchWindow* launch, u32 ctas) {
  if (atomicInc(&launch->readers, ctas - 1) != ctas - 1) return;
  const u32 next = __ldcg(&link->next);
  if (next > 0) __stcg(&launch->window, next);
  __threadfence();
}

}  // namespace dak::window
