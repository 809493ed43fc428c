// Physical memory without an address: allocations in HBM or host DRAM, and the count of what is held.
#pragma once

#include <compare>
#include <cstddef>
#include <map>
#include <string>
#include <vector>

#include "driver.h"

namespace dak {

// Where an allocation lies: HBM of a device, or DRAM of a NUMA node.
struct Place {
  cu::LocationType type = cu::LOCATION_DEVICE;
  int id = 0;               // device ordinal or NUMA node
  bool exportable = false;  // can leave the process as a file descriptor

  bool is_host() const { return type != cu::LOCATION_DEVICE; }
  std::string name() const { return is_host() ? "cpu" : "cuda:" + std::to_string(id); }
  cu::MemAllocationProp properties() const;
};

// One allocation, released with the object. Its mappings are somebody else's.
class PhysicalPages {
 public:
  PhysicalPages() = default;
  // Throws HostMemory or DeviceMemory where there is none left, else Driver.
  static PhysicalPages create(const Place& place, std::size_t bytes);
  // Takes over a handle imported from another process; counted under "imported".
  static PhysicalPages adopt(cu::AllocationHandle handle, std::size_t bytes);
  PhysicalPages(PhysicalPages&& other) noexcept { swap(other); }
  PhysicalPages& operator=(PhysicalPages&& other) noexcept {
    PhysicalPages(std::move(other)).swap(*this);
    return *this;
  }
  ~PhysicalPages();

  cu::AllocationHandle handle() const { return handle_; }
  std::size_t bytes() const { return bytes_; }

 private:
  void swap(PhysicalPages& other) noexcept;

  cu::AllocationHandle handle_ = 0;
  std::size_t bytes_ = 0;  // 0: holds nothing
  const std::string* counted_as_ = nullptr;
};

// Allocations of these sizes; host pages are cleared by the kernel, so up to `threads` threads create.
// All or nothing.
std::vector<PhysicalPages> create_pages(const Place& place, const std::vector<std::size_t>& sizes,
                                        int device, std::size_t threads);

// Bytes held by this process by place ("cuda:0", "cpu", "imported"), and the number of allocations.
std::map<std::string, std::size_t> memory_in_use();
std::size_t live_handles();

// Count memory that is held by other means (registered or pinned host memory) in memory_in_use().
void count_memory(const std::string& name, std::ptrdiff_t bytes);

// An address range without memory, freed with the object (it must be unmapped by then).
class AddressRange {
 public:
  AddressRange() = default;
  AddressRange(std::size_t bytes, std::size_t alignment);
  AddressRange(AddressRange&& other) noexcept { swap(other); }
  AddressRange& operator=(AddressRange&& other) noexcept {
    AddressRange(std::move(other)).swap(*this);
    return *this;
  }
  ~AddressRange();

  cu::DevicePtr address() const { return address_; }
  std::size_t bytes() const { return bytes_; }

 private:
  void swap(AddressRange& other) noexcept;

  cu::DevicePtr address_ = 0;
  std::size_t bytes_ = 0;
};

}  // namespace dak
