// Frees memory in the background, after the work that may still use it.
//
// Tensors die on any thread, inside any lock, and while kernels that read them are still queued. So their
// deleters only leave a note here; one thread waits for the device and frees.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "driver.h"

namespace dak::reaper {

// Run `task` on the reaper's thread once all work now queued on `devices` is done (none: at once).
// After shutdown(), and in a forked child, the task is dropped and what it would have freed is left to the
// end of the process: a task frees by running, never by being destroyed. One that throws is run again, a few
// times. Throws nothing; takes no lock that a driver call is made under.
void enqueue(std::vector<int> devices, std::function<void()> task) noexcept;

// Delete `object` there, with `device` current; for the deleters of shared pointers.
template <class Object>
void free_later(std::vector<int> devices, int device, Object* object) noexcept {
  enqueue(std::move(devices), [device, object] {
    DeviceScope scope(device);  // where this fails nothing is deleted yet, and it is tried again
    delete object;
  });
}

// Waits until nothing is queued or running; false after `seconds`.
bool drain(double seconds);

// drain(), then end the thread. Later tasks are dropped.
void shutdown(double seconds);

// The streams on which graphs may be captured. Waiting for a device would break an open capture, so
// the reaper waits for captures on these to end first.
void watch_streams(std::vector<cu::Stream> streams);

// Whether a capture is open on one of those streams.
bool capture_is_open();

}  // namespace dak::reaper
