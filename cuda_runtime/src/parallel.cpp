#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace dak {
namespace {

constexpr std::size_t COPY_BLOCK = std::size_t{2} << 20;

}  // namespace

void parallel_for(std::size_t count, std::size_t threads,
                  const std::function<void(std::size_t)>& task) {
  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  std::exception_ptr failure;
  auto work = [&] {
    for (std::size_t index; (index = next.fetch_add(1)) < count;) {
      try {
        task(index);
      } catch (...) {
        std::lock_guard lock(mutex);
        if (!failure) failure = std::current_exception();
      }
    }
  };
  std::vector<std::thread> helpers;
  for (std::size_t i = 1; i < std::min(threads, count); ++i) {
    try {
      helpers.emplace_back(work);
    } catch (const std::system_error&) {
      break;  // a limit on threads: those that started, and this one, do it all
    }
  }
  work();
  for (std::thread& helper : helpers) helper.join();
  if (failure) std::rethrow_exception(failure);
}

std::size_t copy_threads() {
  static const std::size_t threads = std::clamp<std::size_t>(std::thread::hardware_concurrency(), 1, 16);
  return threads;
}

void parallel_copy(void* target, const void* source, std::size_t bytes) {
  const std::size_t blocks = (bytes + COPY_BLOCK - 1) / COPY_BLOCK;
  parallel_for(blocks, copy_threads(), [&](std::size_t block) {
    const std::size_t start = block * COPY_BLOCK;
    std::memcpy(static_cast<char*>(target) + start, static_cast<const char*>(source) + start,
                std::min(COPY_BLOCK, bytes - start));
  });
}

}  // namespace dak
