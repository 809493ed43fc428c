#include <algorithm>
#include <iterator>

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
  const std::size_t end = std::max(committed_, growth_end(pages));
  for (const PageRun& run : runs(residency_, committed_, end))
    (run.remote ? bytes.second : bytes.first) += run.count() * page_bytes();
  for (std::size_t i = 0; i < taken_ahead(end); ++i) bytes.second -= ahead_[i].memory.bytes();
  return bytes;
}

// Map the first pages up to `end` in place of zeros, and clear those that are `made` now; or keep the zeros.
void TieredRange::map_grown(std::size_t end, const std::vector<const Segment*>& added,
                            const std::vector<Segment>& made) {
  const cu::DevicePtr address = page_address(committed_);
  const std::size_t bytes = (end - committed_) * page_bytes();
  driver().cuMemUnmap(address, bytes);
  try {
    map_in_order(*tier_, address, added);
    try {
      for (std::size_t i = 0; i < made.size();) {
        const std::size_t first = made[i].pages.first;
        std::size_t last = first;
        while (i < made.size() && made[i].pages.first == last) last = made[i++].pages.last;
        driver().cuMemsetD8Async(page_address(first), 0, (last - first) * page_bytes(), tier_->stream());
      }
      if (!made.empty()) driver().cuStreamSynchronize(tier_->stream());
    } catch (...) {
      driver().cuStreamSynchronize.status(tier_->stream());  // clearing what is unmapped next
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
}

void TieredRange::grow(std::size_t pages) {
  driver();
  if (pages > page_count_)
    throw Error(ErrorKind::Tier, std::to_string(pages) + " pages of a range of " + std::to_string(page_count_));
  cancel_preparation();
  std::lock_guard lock(mutex_);
  need_usable();
  const std::size_t end = growth_end(pages);
  if (end <= committed_) return;
  DeviceScope scope(tier_->device());
  const std::size_t taken = taken_ahead(end);
  std::vector<Segment> made = make_segments(missing(end, taken));
  std::vector<const Segment*> added = pointers(made);
  for (std::size_t i = 0; i < taken; ++i) added.push_back(&ahead_[i]);
  std::sort(added.begin(), added.end(),
            [](const Segment* a, const Segment* b) { return a->pages.first < b->pages.first; });
  map_grown(end, added, made);
  const auto used = ahead_.begin() + static_cast<std::ptrdiff_t>(taken);
  const std::size_t before = segments_.size();
  segments_.reserve(before + added.size());
  std::move(made.begin(), made.end(), std::back_inserter(segments_));
  std::move(ahead_.begin(), used, std::back_inserter(segments_));
  ahead_.erase(ahead_.begin(), used);
  std::sort(segments_.begin() + static_cast<std::ptrdiff_t>(before), segments_.end(),
            [](const Segment& a, const Segment& b) { return a.pages.first < b.pages.first; });
  ++ahead_epoch_;
  committed_ = end;
  if (committed_ == page_count_) zero_block_ = zero_page_ = nullptr;
  ++generation_;
}

}  // namespace dak
