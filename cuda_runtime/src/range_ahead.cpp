// Remote pages made before grow() needs them.
#include <algorithm>

#include "range.h"
#include "reaper.h"

namespace dak {

// Where grow(pages) ends: a page that was made ahead is taken whole.
std::size_t TieredRange::growth_end(std::size_t pages) const {
  std::size_t end = block_end(pages);
  for (const Segment& segment : ahead_)
    if (segment.pages.first < end) end = std::max(end, block_end(segment.pages.last));
  return end;
}

// How many of those made ahead a growth up to `end` takes.
std::size_t TieredRange::taken_ahead(std::size_t end) const {
  const auto beyond = std::find_if(ahead_.begin(), ahead_.end(),
                                   [&](const Segment& segment) { return segment.pages.first >= end; });
  return static_cast<std::size_t>(beyond - ahead_.begin());
}

// The allocations that a growth up to `end` makes beside the first `taken` that were made ahead.
std::vector<PageRun> TieredRange::missing(std::size_t end, std::size_t taken) const {
  std::vector<PageRun> found;
  std::size_t page = committed_;
  const auto up_to = [&](std::size_t last) {
    const std::vector<PageRun> gap = allocations(residency_, page, last);
    found.insert(found.end(), gap.begin(), gap.end());
  };
  for (std::size_t i = 0; i < taken; ++i) {
    up_to(ahead_[i].pages.first);
    page = ahead_[i].pages.last;
  }
  up_to(end);
  return found;
}

std::optional<PageRun> TieredRange::next_run(std::size_t pages) const {
  const std::size_t start = ahead_.empty() ? committed_ : ahead_.back().pages.last;
  const std::size_t end = block_end(std::min(pages, page_count_));
  if (start >= end || !mapped_ || !broken_.empty()) return std::nullopt;
  for (const PageRun& run : allocations(residency_, start, end))
    if (run.remote) return run;
  return std::nullopt;
}

std::size_t TieredRange::next_ahead(std::size_t pages) {
  driver();
  std::lock_guard lock(mutex_);
  const std::optional<PageRun> run = next_run(pages);
  return run ? run->count() * page_bytes() : 0;
}

std::size_t TieredRange::make_ahead(std::size_t pages) {
  driver();
  std::optional<PageRun> run;
  std::uint64_t epoch = 0;
  {
    std::lock_guard lock(mutex_);
    run = next_run(pages);
    epoch = ahead_epoch_;
  }
  if (!run) return 0;
  // Not under the lock, which a step may want: a page takes as long as a small step.
  const std::size_t bytes = run->count() * page_bytes();
  DeviceScope scope(tier_->device());
  Segment segment{*run, std::move(create_pages(tier_->place(true), {bytes}, tier_->device(), 1).front())};
  tier_->clear(segment.memory);
  std::lock_guard lock(mutex_);
  if (epoch == ahead_epoch_) {  // else something else is to be made next, and this one is released
    ahead_.push_back(std::move(segment));
    ++ahead_epoch_;
  }
  return bytes;
}

void TieredRange::drop_ahead() {
  driver();
  auto* dropped = new std::vector<Segment>;
  {
    std::lock_guard lock(mutex_);
    dropped->swap(ahead_);
    ++ahead_epoch_;
  }
  const int device = tier_->device();
  reaper::enqueue({}, [dropped, device] {
    DeviceScope scope(device);
    delete dropped;
  });
}

std::size_t TieredRange::ahead_pages() {
  driver();
  std::lock_guard lock(mutex_);
  return ahead_.empty() ? committed_ : ahead_.back().pages.last;
}

std::size_t TieredRange::ahead_bytes() {
  driver();
  std::lock_guard lock(mutex_);
  std::size_t bytes = 0;
  for (const Segment& segment : ahead_) bytes += segment.memory.bytes();
  return bytes;
}

}  // namespace dak
