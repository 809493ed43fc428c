// Host pages mapped a second time, for the CPU.
#pragma once

#include <memory>
#include <vector>

#include "range.h"

namespace dak {

// The address that kernels use must not be open to the CPU: on driver 580 a copy or fill over a range of
// which some pages are then touches all of it from the CPU, and crashes at the first page of HBM (seen on
// H200: device-to-host and host-to-device copies end in SIGSEGV, fills in an invalid-value error). So host
// pages that the CPU reads or writes get a second address, which stays valid after they moved or were freed.
class CpuWindow {
 public:
  // `segments` are host pages that follow one another. Freed through the reaper.
  static std::shared_ptr<CpuWindow> create(std::shared_ptr<Tier> tier,
                                           const std::vector<const Segment*>& segments);
  ~CpuWindow();
  CpuWindow(const CpuWindow&) = delete;

  std::size_t first_page() const { return first_page_; }
  cu::DevicePtr address() const { return addresses_.address(); }
  std::size_t nbytes() const { return addresses_.bytes(); }

 private:
  CpuWindow(std::shared_ptr<Tier> tier, const std::vector<const Segment*>& segments);

  const std::shared_ptr<Tier> tier_;
  const std::size_t first_page_;
  AddressRange addresses_;
};

}  // namespace dak
