#include "shared_pages.h"

#include "mapping.h"
#include "reaper.h"

namespace dak {

int export_file(const PhysicalPages& memory) {
  int descriptor = -1;
  driver().cuMemExportToShareableHandle(&descriptor, memory.handle(), cu::HANDLE_POSIX_FILE_DESCRIPTOR,
                                        0);
  return descriptor;
}

std::shared_ptr<ImportedPages> ImportedPages::create(
    std::shared_ptr<Tier> tier, const std::vector<std::pair<int, std::size_t>>& files) {
  const std::vector<int> devices = tier->devices();
  const int device = tier->device();
  DeviceScope scope(device);
  return std::shared_ptr<ImportedPages>(
      new ImportedPages(std::move(tier), files),
      [=](ImportedPages* pages) { reaper::free_later(devices, device, pages); });
}

ImportedPages::ImportedPages(std::shared_ptr<Tier> tier,
                             const std::vector<std::pair<int, std::size_t>>& files)
    : tier_(std::move(tier)) {
  if (!tier_->remote_is_host() || files.empty())
    throw Error(ErrorKind::Tier, "pages are imported as host pages, at least one");
  std::size_t bytes = 0;
  for (auto& [descriptor, count] : files) {
    if (!count || count % tier_->page_bytes())
      throw Error(ErrorKind::Tier, "a file of " + std::to_string(count) + " bytes is not whole pages of " +
                                       std::to_string(tier_->page_bytes()));
    bytes += count;
  }
  addresses_ = AddressRange(bytes, tier_->page_bytes());
  std::vector<Segment> segments;
  std::size_t page = 0;
  for (auto& [descriptor, count] : files) {
    cu::AllocationHandle handle = 0;
    void* file = reinterpret_cast<void*>(static_cast<std::intptr_t>(descriptor));
    driver().cuMemImportFromShareableHandle(&handle, file, cu::HANDLE_POSIX_FILE_DESCRIPTOR);
    const std::size_t pages = count / tier_->page_bytes();
    segments.push_back({{page, page + pages, true}, PhysicalPages::adopt(handle, count)});
    page += pages;
  }
  std::vector<const Segment*> in_order;
  for (const Segment& segment : segments) in_order.push_back(&segment);
  map_in_order(*tier_, addresses_.address(), in_order);
  try {
    window_ = CpuWindow::create(tier_, in_order);
  } catch (...) {
    driver().cuMemUnmap.status(addresses_.address(), addresses_.bytes());
    throw;
  }
  for (Segment& segment : segments) pages_.push_back(std::move(segment.memory));
}

ImportedPages::~ImportedPages() {
  try {
    DeviceScope scope(tier_->device());
    driver().cuMemUnmap.status(addresses_.address(), addresses_.bytes());
    pages_.clear();
    addresses_ = {};
  } catch (const Error&) {
    // The context is gone, and its memory with it.
  }
}

}  // namespace dak
