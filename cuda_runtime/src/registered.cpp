#include "registered.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

#include "parallel.h"
#include "physical.h"
#include "reaper.h"

namespace dak {
namespace {

constexpr std::size_t TOUCH_BLOCK = std::size_t{2} << 20;
constexpr std::size_t TOUCH_THREADS = 8;

}  // namespace

std::shared_ptr<RegisteredBlock> RegisteredBlock::create(int device, std::size_t nbytes, bool remote) {
  DeviceScope scope(device);
  return std::shared_ptr<RegisteredBlock>(
      new RegisteredBlock(device, nbytes, remote),
      [device](RegisteredBlock* block) { reaper::free_later({device}, device, block); });
}

RegisteredBlock::RegisteredBlock(int device, std::size_t nbytes, bool remote)
    : device_(device), nbytes_(nbytes) {
  const std::size_t wanted = std::max<std::size_t>(nbytes, 1);
  if (remote) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    held_ = (wanted + page - 1) / page * page;
    take_host_memory();
    count_memory("cpu", static_cast<std::ptrdiff_t>(held_));
    return;
  }
  const cu::Result status = driver().cuMemAlloc.status(&address_, wanted);
  if (status == cu::ERROR_OUT_OF_MEMORY)
    throw Error(ErrorKind::DeviceMemory,
                "cuMemAlloc of " + std::to_string(wanted) + " bytes failed with " + describe(status));
  if (status != cu::SUCCESS) throw_driver_error("cuMemAlloc", status);
  held_ = wanted;
  count_memory("cuda:" + std::to_string(device), static_cast<std::ptrdiff_t>(held_));
}

void RegisteredBlock::take_host_memory() {
  void* memory = mmap(nullptr, held_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED)
    throw Error(ErrorKind::HostMemory, "mmap of " + std::to_string(held_) +
                                           " bytes of host memory failed: " + std::strerror(errno));
  madvise(memory, held_, MADV_HUGEPAGE);  // a wish only
  parallel_for((held_ + TOUCH_BLOCK - 1) / TOUCH_BLOCK, TOUCH_THREADS, [&](std::size_t block) {
    const std::size_t start = block * TOUCH_BLOCK;
    std::memset(static_cast<char*>(memory) + start, 0, std::min(TOUCH_BLOCK, held_ - start));
  });
  try {
    driver().cuMemHostRegister(memory, held_, cu::MEMHOST_PORTABLE | cu::MEMHOST_DEVICEMAP);
    try {
      driver().cuMemHostGetDevicePointer(&address_, memory, 0);
    } catch (...) {
      driver().cuMemHostUnregister.status(memory);
      throw;
    }
  } catch (...) {
    munmap(memory, held_);
    throw;
  }
  host_ = memory;
}

RegisteredBlock::~RegisteredBlock() {
  try {
    DeviceScope scope(device_);
    bool freed = false;
    if (host_)
      freed = driver().cuMemHostUnregister.status(host_) == cu::SUCCESS && munmap(host_, held_) == 0;
    else
      freed = driver().cuMemFree.status(address_) == cu::SUCCESS;
    if (freed)
      count_memory(host_ ? "cpu" : "cuda:" + std::to_string(device_),
                   -static_cast<std::ptrdiff_t>(held_));
  } catch (const Error&) {
    // The context is gone, and its memory with it.
  }
}

void RegisteredBlock::check(std::size_t count, std::size_t offset) const {
  driver();
  if (offset > nbytes_ || count > nbytes_ - offset)
    throw Error(ErrorKind::Tier, std::to_string(count) + " bytes at " + std::to_string(offset) +
                                     " do not fit a buffer of " + std::to_string(nbytes_) + " bytes");
}

void RegisteredBlock::write(const void* bytes, std::size_t count, std::size_t offset) {
  check(count, offset);
  if (host_) {
    parallel_copy(static_cast<char*>(host_) + offset, bytes, count);
    return;
  }
  DeviceScope scope(device_);
  driver().cuMemcpyHtoDAsync(address_ + offset, bytes, count, nullptr);
  driver().cuStreamSynchronize(nullptr);
}

void RegisteredBlock::read(void* bytes, std::size_t count, std::size_t offset) {
  check(count, offset);
  if (host_) {
    std::memcpy(bytes, static_cast<const char*>(host_) + offset, count);
    return;
  }
  DeviceScope scope(device_);
  driver().cuMemcpyDtoHAsync(bytes, address_ + offset, count, nullptr);
  driver().cuStreamSynchronize(nullptr);
}

}  // namespace dak
