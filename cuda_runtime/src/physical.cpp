#include "physical.h"

#include <mutex>
#include <set>
#include <utility>

#include "parallel.h"

namespace dak {
namespace {

struct Ledger {
  std::mutex mutex;
  std::map<std::string, std::size_t> bytes;  // nodes are never erased: allocations point at the keys
  std::size_t handles = 0;

  const std::string* enter(const std::string& name, std::ptrdiff_t change, int handles_change) {
    std::lock_guard lock(mutex);
    auto entry = bytes.try_emplace(name, 0).first;
    entry->second += change;
    handles += handles_change;
    return &entry->first;
  }
};
Ledger& ledger() {
  static Ledger* instance = new Ledger;  // outlives static destruction: late releases still count
  return *instance;
}

}  // namespace

cu::MemAllocationProp Place::properties() const {
  cu::MemAllocationProp properties{};
  properties.type = cu::ALLOCATION_PINNED;
  properties.requestedHandleTypes = exportable ? cu::HANDLE_POSIX_FILE_DESCRIPTOR : cu::HANDLE_NONE;
  properties.location = {type, id};
  return properties;
}

PhysicalPages PhysicalPages::create(const Place& place, std::size_t bytes) {
  PhysicalPages pages;
  const cu::MemAllocationProp properties = place.properties();
  const cu::Result status = driver().cuMemCreate.status(&pages.handle_, bytes, &properties, 0);
  if (status == cu::ERROR_OUT_OF_MEMORY) {
    const std::string asked = std::to_string(bytes) + " bytes on " + place.name();
    throw Error(place.is_host() ? ErrorKind::HostMemory : ErrorKind::DeviceMemory,
                "cuMemCreate of " + asked + " failed with " + describe(status), "cuMemCreate", status);
  }
  if (status != cu::SUCCESS) throw_driver_error("cuMemCreate", status);
  pages.bytes_ = bytes;
  pages.counted_as_ = ledger().enter(place.name(), static_cast<std::ptrdiff_t>(bytes), 1);
  return pages;
}

PhysicalPages PhysicalPages::adopt(cu::AllocationHandle handle, std::size_t bytes) {
  PhysicalPages pages;
  pages.handle_ = handle;
  pages.bytes_ = bytes;
  pages.counted_as_ = ledger().enter("imported", static_cast<std::ptrdiff_t>(bytes), 1);
  return pages;
}

PhysicalPages::~PhysicalPages() {
  if (!bytes_ || in_forked_child() || !driver_is_open()) return;
  // A release that fails leaves the memory held, and so it stays in the count.
  if (driver().cuMemRelease.status(handle_) == cu::SUCCESS)
    ledger().enter(*counted_as_, -static_cast<std::ptrdiff_t>(bytes_), -1);
}

void PhysicalPages::swap(PhysicalPages& other) noexcept {
  std::swap(handle_, other.handle_);
  std::swap(bytes_, other.bytes_);
  std::swap(counted_as_, other.counted_as_);
}

std::vector<PhysicalPages> create_pages(const Place& place, const std::vector<std::size_t>& sizes,
                                        int device, std::size_t threads) {
  std::vector<PhysicalPages> pages(sizes.size());
  parallel_for(sizes.size(), threads, [&](std::size_t i) {
    DeviceScope scope(device);
    pages[i] = PhysicalPages::create(place, sizes[i]);
  });
  return pages;
}

std::map<std::string, std::size_t> memory_in_use() {
  std::lock_guard lock(ledger().mutex);
  std::map<std::string, std::size_t> held;
  for (auto& [name, bytes] : ledger().bytes)
    if (bytes) held[name] = bytes;
  return held;
}

std::size_t live_handles() {
  std::lock_guard lock(ledger().mutex);
  return ledger().handles;
}

void count_memory(const std::string& name, std::ptrdiff_t bytes) { ledger().enter(name, bytes, 0); }

AddressRange::AddressRange(std::size_t bytes, std::size_t alignment) {
  driver().cuMemAddressReserve(&address_, bytes, alignment, 0, 0);
  bytes_ = bytes;
}

AddressRange::~AddressRange() {
  if (!bytes_ || in_forked_child() || !driver_is_open()) return;
  driver().cuMemAddressFree.status(address_, bytes_);
}

void AddressRange::swap(AddressRange& other) noexcept {
  std::swap(address_, other.address_);
  std::swap(bytes_, other.bytes_);
}

}  // namespace dak
