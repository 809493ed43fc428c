#include "transfer.h"

#include <algorithm>
#include <array>
#include <mutex>
#include <optional>

#include "parallel.h"

namespace dak {
namespace {

constexpr std::size_t BLOCK_BYTES = std::size_t{8} << 20;  // with two of 64 MiB loads were slower
constexpr std::size_t BLOCKS = 4;
constexpr std::size_t GRAIN_BYTES = std::size_t{2} << 20;

// Pinned blocks that the copy engine reads while the next is being filled. One for the process: loads of
// several tiers take turns.
struct Ring {
  std::mutex mutex;
  std::array<void*, BLOCKS> blocks{};
  std::size_t block_bytes = 0;

  // Blocks of at least `bytes`, so that small writes pin little.
  void need(std::size_t bytes) {
    const std::size_t wanted = (bytes + GRAIN_BYTES - 1) / GRAIN_BYTES * GRAIN_BYTES;
    if (wanted > block_bytes) release();
    block_bytes = std::max(block_bytes, wanted);
    for (void*& block : blocks) {
      if (block) continue;
      driver().cuMemHostAlloc(&block, block_bytes, cu::MEMHOST_PORTABLE);
      count_memory("staging", static_cast<std::ptrdiff_t>(block_bytes));
    }
  }

  void release() {
    for (void*& block : blocks) {
      if (!block) continue;
      if (driver().cuMemFreeHost.status(block) == cu::SUCCESS)
        count_memory("staging", -static_cast<std::ptrdiff_t>(block_bytes));
      block = nullptr;
    }
    block_bytes = 0;
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

void copy_in(const Tier& tier, cu::DevicePtr target, const char* source, std::size_t count) {
  const Driver& cuda = driver();
  std::lock_guard lock(ring().mutex);
  ring().need(std::min(count, BLOCK_BYTES));
  std::optional<Events> filled;
  if (count > BLOCKS * BLOCK_BYTES) filled.emplace();
  try {
    for (std::size_t start = 0, index = 0; start < count; start += BLOCK_BYTES, ++index) {
      const std::size_t bytes = std::min(BLOCK_BYTES, count - start), slot = index % BLOCKS;
      if (index >= BLOCKS) cuda.cuEventSynchronize((*filled)[slot]);
      parallel_copy(ring().blocks[slot], source + start, bytes);
      cuda.cuMemcpyHtoDAsync(target + start, ring().blocks[slot], bytes, tier.stream());
      if (filled) cuda.cuEventRecord((*filled)[slot], tier.stream());
    }
    cuda.cuStreamSynchronize(tier.stream());
  } catch (...) {
    cuda.cuStreamSynchronize.status(tier.stream());  // the blocks are in use until then
    throw;
  }
}

void release_staging() {
  std::lock_guard lock(ring().mutex);
  ring().release();
}

}  // namespace dak
