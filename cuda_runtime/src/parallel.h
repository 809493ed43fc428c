// Short-lived threads for work that one core cannot do fast enough: clearing host pages, copying.
#pragma once

#include <cstddef>
#include <functional>

namespace dak {

// Calls task(0) .. task(count - 1), each once, on up to `threads` threads (this one included). Every task
// is run even if one throws; the first exception is rethrown at the end.
void parallel_for(std::size_t count, std::size_t threads,
                  const std::function<void(std::size_t)>& task);

// memcpy on several threads, for blocks of several MiB.
void parallel_copy(void* target, const void* source, std::size_t bytes);

// Threads worth using for copies on this machine: its cores, at most 16.
std::size_t copy_threads();

}  // namespace dak
