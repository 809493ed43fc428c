#include "cpu_window.h"

#include "mapping.h"
#include "reaper.h"

namespace dak {

std::shared_ptr<CpuWindow> CpuWindow::create(std::shared_ptr<Tier> tier,
                                             const std::vector<const Segment*>& segments) {
  const int device = tier->device();
  return std::shared_ptr<CpuWindow>(
      new CpuWindow(std::move(tier), segments),
      [device](CpuWindow* window) { reaper::free_later({}, device, window); });
}

CpuWindow::CpuWindow(std::shared_ptr<Tier> tier, const std::vector<const Segment*>& segments)
    : tier_(std::move(tier)), first_page_(segments.empty() ? 0 : segments.front()->pages.first) {
  if (!tier_->remote_is_host() || segments.empty())
    throw Error(ErrorKind::Tier, "the CPU reads host pages, and there are none here");
  std::size_t bytes = 0;
  for (const Segment* segment : segments) bytes += segment->memory.bytes();
  addresses_ = AddressRange(bytes, tier_->page_bytes());
  map_in_order(*tier_, addresses_.address(), segments, Access::Cpu);
}

CpuWindow::~CpuWindow() {
  try {
    DeviceScope scope(tier_->device());
    driver().cuMemUnmap.status(addresses_.address(), addresses_.bytes());
    addresses_ = {};
  } catch (const Error&) {
    // The context is gone, and its memory with it.
  }
}

}  // namespace dak
