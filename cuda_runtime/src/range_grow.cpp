#include <algorithm>

#include "mapping.h"
#include "range.h"

namespace dak {

std::shared_ptr<TieredRange> TieredRange::create_growing(std::shared_ptr<Tier> tier, std::size_t nbytes,
                                                         std::size_t split) {
  auto range = make_any(std::move(tier), nbytes, split, true);
  range->map();
  return range;
}

std::size_t TieredRange::block_end(std::size_t pages) const {
  if (pages == 0) return 0;
  // A block cannot be unmapped in part, and what is left behind the last whole one goes page by page.
  const std::size_t blocks = page_count_ / block_pages_ * block_pages_;
  const std::size_t end = (pages + block_pages_ - 1) / block_pages_ * block_pages_;
  return end <= blocks ? end : std::min(std::max(pages, blocks), page_count_);
}

std::vector<PageRun> TieredRange::zero_runs(std::size_t first, std::size_t last) const {
  std::vector<PageRun> found;
  for (std::size_t page = first; page < last;) {
    const bool whole = page % block_pages_ == 0 && page + block_pages_ <= last;
    found.push_back({page, page + (whole ? block_pages_ : 1)});
    page = found.back().last;
  }
  return found;
}

void TieredRange::map_zeros(std::size_t first, std::size_t last) {
  const Driver& cuda = driver();
  std::size_t mapped = 0;
  try {
    for (const PageRun& run : zero_runs(first, last)) {
      const PhysicalPages& zeros = run.count() == block_pages_ ? *zero_block_ : *zero_page_;
      cuda.cuMemMap(page_address(run.first), zeros.bytes(), 0, zeros.handle(), 0);
      mapped += zeros.bytes();
    }
    tier_->grant_reading(page_address(first), mapped);
  } catch (...) {
    if (mapped) cuda.cuMemUnmap.status(page_address(first), mapped);
    throw;
  }
}

void TieredRange::need_committed(std::size_t count, std::size_t offset) const {
  if (offset_ + offset + count <= committed_ * page_bytes() || committed_ == page_count_) return;
  throw Error(ErrorKind::Tier, std::to_string(count) + " bytes at " + std::to_string(offset) +
                                   " are not all committed: grow the buffer first");
}

std::size_t TieredRange::committed_pages() {
  driver();
  std::lock_guard lock(mutex_);
  return committed_;
}

std::pair<std::size_t, std::size_t> TieredRange::growth(std::size_t pages) {
  driver();
  std::lock_guard lock(mutex_);
  std::pair<std::size_t, std::size_t> bytes;
  for (const PageRun& run : runs(residency_, committed_, std::max(committed_, block_end(pages))))
    (run.remote ? bytes.second : bytes.first) += run.count() * page_bytes();
  return bytes;
}

void TieredRange::grow(std::size_t pages) {
  driver();
  if (pages > page_count_)
    throw Error(ErrorKind::Tier, std::to_string(pages) + " pages of a range of " + std::to_string(page_count_));
  cancel_preparation();
  std::lock_guard lock(mutex_);
  need_usable();
  const std::size_t end = block_end(pages);
  if (end <= committed_) return;
  DeviceScope scope(tier_->device());
  const cu::DevicePtr address = page_address(committed_);
  const std::size_t bytes = (end - committed_) * page_bytes();
  std::vector<Segment> added = make_segments(allocations(residency_, committed_, end));
  driver().cuMemUnmap(address, bytes);
  try {
    map_in_order(*tier_, address, pointers(added));
    try {
      driver().cuMemsetD8Async(address, 0, bytes, tier_->stream());
      driver().cuStreamSynchronize(tier_->stream());
    } catch (...) {
      driver().cuMemUnmap.status(address, bytes);
      throw;
    }
  } catch (const Error& error) {
    try {
      map_zeros(committed_, end);
    } catch (const Error& second) {
      broken_ = "a tiered tensor of " + std::to_string(nbytes_) + " bytes is lost: it could not grow (" +
                error.what() + ") and its pages could not be put back (" + second.what() + ")";
      throw Error(ErrorKind::Driver, broken_, second.call, second.status);
    }
    throw;
  }
  for (Segment& segment : added) segments_.push_back(std::move(segment));
  committed_ = end;
  if (committed_ == page_count_) zero_block_ = zero_page_ = nullptr;
  ++generation_;
}

}  // namespace dak
