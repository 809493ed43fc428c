// Host pages that two processes share: exported as file descriptors, mapped by the other side.
#pragma once

#include <memory>
#include <vector>

#include "cpu_window.h"
#include "tier.h"

namespace dak {

// A file descriptor for an allocation; the caller closes it.
int export_file(const PhysicalPages& memory);

// Allocations of another process in order, in one address range for the tier's device and one for the CPU.
// Freed through the reaper.
class ImportedPages {
 public:
  // Descriptors and the bytes of each (whole pages). The caller keeps the descriptors and may close them.
  static std::shared_ptr<ImportedPages> create(std::shared_ptr<Tier> tier,
                                               const std::vector<std::pair<int, std::size_t>>& files);
  ~ImportedPages();

  cu::DevicePtr address() const { return addresses_.address(); }
  cu::DevicePtr cpu_address() const { return window_->address(); }
  std::size_t nbytes() const { return addresses_.bytes(); }

 private:
  ImportedPages(std::shared_ptr<Tier> tier, const std::vector<std::pair<int, std::size_t>>& files);

  const std::shared_ptr<Tier> tier_;
  AddressRange addresses_;
  std::shared_ptr<CpuWindow> window_;
  std::vector<PhysicalPages> pages_;
};

}  // namespace dak
