#include "transfer.h"

#include <algorithm>
#include <array>
#include <mutex>

#include "parallel.h"

namespace dak {
namespace {

constexpr std::size_t BLOCK_BYTES = std::size_t{8} << 20;
constexpr std::size_t BLOCKS = 4;

// Pinned blocks that the copy engine reads while the next is being filled. One for the process: loads of
// several tiers take turns.
struct Ring {
  std::mutex mutex;
  std::array<void*, BLOCKS> blocks{};

  void need_blocks() {
    for (void*& block : blocks) {
      if (block) continue;
      driver().cuMemHostAlloc(&block, BLOCK_BYTES, cu::MEMHOST_PORTABLE);
      count_memory("staging", BLOCK_BYTES);
    }
  }
};
Ring& ring() {
  static Ring* instance = new Ring;
  return *instance;
}

// Events that say when each block may be filled again; of the current context.
class Events {
 public:
  Events() {
    for (cu::Event& event : events_) driver().cuEventCreate(&event, cu::EVENT_DISABLE_TIMING);
  }
  ~Events() {
    for (cu::Event event : events_)
      if (event) driver().cuEventDestroy.status(event);
  }
  cu::Event operator[](std::size_t i) const { return events_[i]; }

 private:
  std::array<cu::Event, BLOCKS> events_{};
};

}  // namespace

void write_by_copy_engine(const Tier& tier, cu::DevicePtr target, const char* source,
                        std::size_t count) {
  const Driver& cuda = driver();
  std::lock_guard lock(ring().mutex);
  ring().need_blocks();
  Events filled;
  try {
    for (std::size_t start = 0, index = 0; start < count; start += BLOCK_BYTES, ++index) {
      const std::size_t bytes = std::min(BLOCK_BYTES, count - start), slot = index % BLOCKS;
      if (index >= BLOCKS) cuda.cuEventSynchronize(filled[slot]);
      parallel_copy(ring().blocks[slot], source + start, bytes);
      cuda.cuMemcpyHtoDAsync(target + start, ring().blocks[slot], bytes, tier.stream());
      cuda.cuEventRecord(filled[slot], tier.stream());
    }
    cuda.cuStreamSynchronize(tier.stream());
  } catch (...) {
    cuda.cuStreamSynchronize.status(tier.stream());  // the blocks are in use until then
    throw;
  }
}

void write_by_cpu(cu::DevicePtr target, const char* source, std::size_t count) {
  parallel_copy(reinterpret_cast<void*>(target), source, count);
}

void release_staging() {
  std::lock_guard lock(ring().mutex);
  for (void*& block : ring().blocks) {
    if (!block) continue;
    if (driver().cuMemFreeHost.status(block) == cu::SUCCESS)
      count_memory("staging", -static_cast<std::ptrdiff_t>(BLOCK_BYTES));
    block = nullptr;
  }
}

}  // namespace dak
