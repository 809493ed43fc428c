#include <algorithm>

#include "mapping.h"
#include "range.h"
#include "reaper.h"
#include "stopwatch.h"

namespace dak {

std::vector<PageRun> TieredRange::affected(const Residency& target) const {
  std::vector<PageRun> found;
  for (const Segment& segment : segments_) {
    const auto begin = target.begin() + segment.pages.first, end = target.begin() + segment.pages.last;
    const bool stays = std::all_of(begin, end, [&](auto tier) { return (tier != 0) == segment.pages.remote; });
    if (stays) continue;
    if (!found.empty() && found.back().last == segment.pages.first)
      found.back().last = segment.pages.last;
    else
      found.push_back({segment.pages.first, segment.pages.last});
  }
  return found;
}

TieredRange::Preparation TieredRange::prepare(const Residency& target) const {
  Preparation preparation{target, {}};
  try {
    for (const PageRun& pages : affected(target)) {
      Patch& patch = preparation.patches.emplace_back();
      patch.pages = pages;
      patch.replacement = make_segments(allocations(target, pages.first, pages.last));
      patch.staging = AddressRange(pages.count() * page_bytes(), page_bytes());
      map_in_order(*tier_, patch.staging.address(), pointers(patch.replacement));
      patch.staged = true;
    }
  } catch (...) {
    unstage(preparation.patches);
    throw;
  }
  return preparation;
}

void TieredRange::unstage(std::vector<Patch>& patches) noexcept {
  for (Patch& patch : patches) {
    if (patch.staged) driver().cuMemUnmap.status(patch.staging.address(), patch.staging.bytes());
    patch.staged = false;
  }
}

void TieredRange::prepare_in_background(Residency target) {
  cancel_preparation();
  std::lock_guard future_lock(preparing_mutex_);
  std::lock_guard lock(mutex_);
  need_usable();
  if (target.size() != page_count_ || target == residency_) return;
  preparing_ = std::async(std::launch::async, [this, target = std::move(target)] {
    std::lock_guard inner(mutex_);
    try {
      DeviceScope scope(tier_->device());
      prepared_ = prepare(target);
    } catch (const Error&) {
      // The move itself meets the same failure and reports it.
    }
  });
}

void TieredRange::finish_preparation() {
  driver();
  std::lock_guard lock(preparing_mutex_);
  if (preparing_.valid()) preparing_.get();
}

void TieredRange::cancel_preparation() {
  finish_preparation();
  std::lock_guard lock(mutex_);
  if (!prepared_) return;
  DeviceScope scope(tier_->device());
  unstage(prepared_->patches);
  prepared_.reset();
}

std::size_t TieredRange::copy_to_staging(const Preparation& preparation) const {
  std::size_t bytes = 0;
  for (const Patch& patch : preparation.patches) {
    // One copy per pair of tiers: a copy engine serves each at its own rate.
    for (const PageRun& from : runs(residency_, patch.pages.first, patch.pages.last))
      for (const PageRun& run : runs(preparation.target, from.first, from.last)) {
        const std::size_t count = run.count() * page_bytes();
        const std::size_t start = (run.first - patch.pages.first) * page_bytes();
        copy_async(*tier_, patch.staging.address() + start, page_address(run.first), count);
        bytes += count;
      }
  }
  driver().cuStreamSynchronize(tier_->stream());
  return bytes;
}

std::vector<const Segment*> TieredRange::segments_in(const PageRun& pages) const {
  std::vector<const Segment*> found;
  for (const Segment& segment : segments_)
    if (segment.pages.first >= pages.first && segment.pages.last <= pages.last)
      found.push_back(&segment);
  return found;
}

void TieredRange::remap(const Preparation& preparation) {
  std::size_t unmapped = 0, replaced = 0;
  try {
    for (const Patch& patch : preparation.patches) {
      driver().cuMemUnmap(page_address(patch.pages.first), patch.staging.bytes());
      ++unmapped;
      map_in_order(*tier_, page_address(patch.pages.first), pointers(patch.replacement));
      ++replaced;
    }
  } catch (const Error& error) {
    restore(preparation, unmapped, replaced, error.what());
    throw;
  }
}

// The first `replaced` patches hold their new pages; those from there to `unmapped` hold none.
void TieredRange::restore(const Preparation& preparation, std::size_t unmapped, std::size_t replaced,
                          const std::string& cause) {
  try {
    for (std::size_t i = 0; i < unmapped; ++i) {
      const PageRun& pages = preparation.patches[i].pages;
      if (i < replaced)
        driver().cuMemUnmap(page_address(pages.first), pages.count() * page_bytes());
      map_in_order(*tier_, page_address(pages.first), segments_in(pages));
    }
  } catch (const Error& error) {
    broken_ = "a tiered tensor of " + std::to_string(nbytes_) + " bytes is lost: a move failed (" + cause +
              ") and so did putting its pages back (" + error.what() + ")";
    throw Error(ErrorKind::Driver, broken_, error.call, error.status);
  }
}

std::vector<Segment> TieredRange::commit(Preparation& preparation) {
  std::vector<Segment> kept, replaced;
  auto patch = preparation.patches.begin();
  for (Segment& segment : segments_) {
    while (patch != preparation.patches.end() && patch->pages.last <= segment.pages.first) ++patch;
    const bool stays = patch == preparation.patches.end() || segment.pages.last <= patch->pages.first;
    (stays ? kept : replaced).push_back(std::move(segment));
  }
  for (Patch& done : preparation.patches)
    for (Segment& segment : done.replacement) kept.push_back(std::move(segment));
  std::sort(kept.begin(), kept.end(),
            [](const Segment& a, const Segment& b) { return a.pages.first < b.pages.first; });
  segments_ = std::move(kept);
  for (Segment& segment : ahead_) replaced.push_back(std::move(segment));  // made for the old residency
  ahead_.clear();
  ++ahead_epoch_;
  residency_ = preparation.target;
  ++generation_;
  return replaced;
}

MoveTimes TieredRange::move(const Residency& target) {
  driver();
  if (target.size() != page_count_)
    throw Error(ErrorKind::Tier, "residency of " + std::to_string(target.size()) + " pages for a range of " +
                                     std::to_string(page_count_));
  finish_preparation();
  std::lock_guard lock(mutex_);
  need_usable();
  MoveTimes times;
  if (target == residency_) return times;
  Stopwatch clock;
  try {
    DeviceScope scope(tier_->device());
    if (prepared_ && prepared_->target != target) {
      unstage(prepared_->patches);
      prepared_.reset();
    }
    times.prepared_ahead = prepared_.has_value();
    Preparation preparation = prepared_ ? std::move(*prepared_) : prepare(target);
    prepared_.reset();
    times.prepare_seconds = clock.lap();
    try {
      times.bytes_copied = copy_to_staging(preparation);
      times.copy_seconds = clock.lap();
      remap(preparation);
    } catch (...) {
      driver().cuStreamSynchronize.status(tier_->stream());  // copies into what is unmapped next
      unstage(preparation.patches);
      throw;
    }
    std::vector<Segment> replaced = commit(preparation);
    times.remap_seconds = clock.lap();
    // HBM is given back at once: the caller's budget counts it. Unpinning host pages can wait.
    auto* later = new std::pair(std::vector<Segment>{}, std::move(preparation.patches));
    for (Segment& segment : replaced)
      if (tier_->remote_is_host() && segment.pages.remote) later->first.push_back(std::move(segment));
    replaced.clear();
    const int device = tier_->device();
    reaper::enqueue({}, [later, device] {
      DeviceScope inner(device);
      unstage(later->second);
      delete later;
    });
    times.release_seconds = clock.lap();
    return times;
  } catch (const Error& error) {
    if (!broken_.empty()) throw;
    throw Error(ErrorKind::Move,
                "a tiered tensor of " + std::to_string(nbytes_) +
                    " bytes was not moved and keeps its placement: " + error.what(),
                error.call, error.status);
  }
}

}  // namespace dak
