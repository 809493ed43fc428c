#include "transfer.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <functional>
#include <mutex>
#include <optional>
#include <string>

#include "parallel.h"

namespace dak {
namespace {

constexpr std::size_t BLOCK_BYTES = std::size_t{8} << 20;
constexpr std::size_t BLOCKS = 4;  // and as many threads that fill them
constexpr std::size_t GRAIN_BYTES = std::size_t{2} << 20;

// Pinned blocks that the copy engine reads while the next is being filled. One for the process: loads of
// several tiers take turns.
struct Ring {
  std::mutex mutex;
  std::array<void*, BLOCKS> blocks{};
  std::size_t block_bytes = 0;

  // Blocks of at least `bytes`, so that small writes pin little.
  void need(std::size_t bytes) {
    if (bytes > block_bytes) release();
    block_bytes = std::max(block_bytes, bytes);
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

std::size_t round_up(std::size_t bytes) { return (bytes + GRAIN_BYTES - 1) / GRAIN_BYTES * GRAIN_BYTES; }

// Events that say when each block may be filled again; of the current context.
class Events {
 public:
  Events() : Events(nullptr) {  // complete before the first call, so that a failure destroys what is there
    for (cu::Event& event : events_) driver().cuEventCreate(&event, cu::EVENT_DISABLE_TIMING);
  }
  ~Events() {
    for (cu::Event event : events_)
      if (event) driver().cuEventDestroy.status(event);
  }
  cu::Event operator[](std::size_t i) const { return events_[i]; }

 private:
  explicit Events(std::nullptr_t) {}
  std::array<cu::Event, BLOCKS> events_{};
};

// Puts bytes [start, start + bytes) of the source into a block.
using Reader = std::function<void(char* block, std::size_t start, std::size_t bytes)>;

// Every block has one thread that fills it, hands it to the copy engine, and waits before filling it again:
// threads start once for a tensor, and none waits for another.
void copy_through_ring(const Tier& tier, cu::DevicePtr target, std::size_t count, const Reader& read) {
  const Driver& cuda = driver();
  const std::size_t block_bytes = std::min(BLOCK_BYTES, round_up((count + BLOCKS - 1) / BLOCKS));
  std::lock_guard lock(ring().mutex);
  ring().need(block_bytes);
  std::optional<Events> copied;
  if (count > BLOCKS * block_bytes) copied.emplace();
  const auto work = [&](std::size_t slot) {
    DeviceScope scope(tier.device());
    char* block = static_cast<char*>(ring().blocks[slot]);
    for (std::size_t start = slot * block_bytes; start < count; start += BLOCKS * block_bytes) {
      if (start >= BLOCKS * block_bytes) cuda.cuEventSynchronize((*copied)[slot]);
      const std::size_t bytes = std::min(block_bytes, count - start);
      read(block, start, bytes);
      cuda.cuMemcpyHtoDAsync(target + start, block, bytes, tier.stream());
      if (copied) cuda.cuEventRecord((*copied)[slot], tier.stream());
    }
  };
  try {
    parallel_for(std::min(BLOCKS, (count + block_bytes - 1) / block_bytes), BLOCKS, work);
    cuda.cuStreamSynchronize(tier.stream());
  } catch (...) {
    cuda.cuStreamSynchronize.status(tier.stream());  // the blocks are in use until then
    throw;
  }
}

}  // namespace

void copy_in(const Tier& tier, cu::DevicePtr target, const char* source, std::size_t count) {
  copy_through_ring(tier, target, count, [=](char* block, std::size_t start, std::size_t bytes) {
    std::memcpy(block, source + start, bytes);
  });
}

void copy_in_file(const Tier& tier, cu::DevicePtr target, int descriptor, off_t position,
                  std::size_t count) {
  copy_through_ring(tier, target, count, [=](char* block, std::size_t start, std::size_t bytes) {
    for (std::size_t done = 0; done < bytes;) {
      const off_t from = position + static_cast<off_t>(start + done);
      const ssize_t got = pread(descriptor, block + done, bytes - done, from);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0)
        throw Error(ErrorKind::Checkpoint,
                    got < 0 ? "the file cannot be read at byte " + std::to_string(from) + ": " +
                                  std::strerror(errno)
                            : "the file ends at byte " + std::to_string(from) + ", before the tensor does");
      done += static_cast<std::size_t>(got);
    }
  });
}

void release_staging() {
  std::lock_guard lock(ring().mutex);
  ring().release();
}

}  // namespace dak
