#include "range.h"

#include <unistd.h>

#include <algorithm>

#include "cpu_window.h"
#include "mapping.h"
#include "reaper.h"
#include "shared_pages.h"
#include "stopwatch.h"
#include "transfer.h"

namespace dak {

std::shared_ptr<TieredRange> TieredRange::create(std::shared_ptr<Tier> tier, std::size_t nbytes,
                                                 std::size_t split) {
  auto range = make(std::move(tier), nbytes, split);
  range->map();
  return range;
}

std::shared_ptr<TieredRange> TieredRange::make(std::shared_ptr<Tier> tier, std::size_t nbytes,
                                               std::size_t split) {
  return make_any(std::move(tier), nbytes, split, false);
}

std::shared_ptr<TieredRange> TieredRange::make_any(std::shared_ptr<Tier> tier, std::size_t nbytes,
                                                   std::size_t split, bool growing) {
  const std::vector<int> devices = tier->devices();
  const int device = tier->device();
  DeviceScope scope(device);
  // The last owner may be any thread, inside any lock: it only leaves a note.
  return std::shared_ptr<TieredRange>(
      new TieredRange(std::move(tier), nbytes, split, growing),
      [=](TieredRange* range) { reaper::free_later(devices, device, range); });
}

void TieredRange::map() {
  driver();
  std::lock_guard lock(mutex_);
  if (mapped_) return;
  if (!broken_.empty()) throw Error(ErrorKind::Driver, broken_);
  try {
    DeviceScope scope(tier_->device());
    const MapTimes times = map_in_order(*tier_, addresses_.address(), pointers(segments_));
    make_times_.map_seconds = times.map_seconds;
    make_times_.access_seconds = times.access_seconds;
    if (committed_ < page_count_) map_zeros(committed_, page_count_);
    mapped_ = true;
  } catch (...) {
    segments_.clear();  // at once: an exception may keep this object for long
    broken_ = "the pages of this range could not be mapped";
    throw;
  }
}

TieredRange::TieredRange(std::shared_ptr<Tier> tier, std::size_t nbytes, std::size_t split, bool growing)
    : tier_(std::move(tier)), nbytes_(nbytes) {
  const std::size_t page = page_bytes();
  if (split < nbytes) offset_ = (page - split % page) % page;
  page_count_ = (offset_ + nbytes + page - 1) / page;
  const std::size_t local = split < nbytes ? (offset_ + split) / page : page_count_;
  residency_ = prefix(split ? local : 0, page_count_);
  addresses_ = AddressRange(std::max<std::size_t>(page_count_, 1) * page, page);
  Stopwatch watch;
  if (growing) {
    while (block_pages_ < MOST_BLOCK_PAGES && block_pages_ * BLOCKS_PER_RANGE < page_count_) block_pages_ *= 2;
    zero_block_ = tier_->zeros(block_pages_ * page);
    zero_page_ = tier_->zeros(page);
  } else {
    segments_ = make_segments(allocations(residency_, 0, page_count_));
    committed_ = page_count_;
  }
  make_times_.create_seconds = watch.lap();
}

TieredRange::~TieredRange() {
  std::optional<DeviceScope> scope;
  try {
    cancel_preparation();
    scope.emplace(tier_->device());
  } catch (const Error&) {
    // Unmapping needs no context. Pages that are released while they are mapped would stay held, and
    // count as free.
  }
  try {
    if (!mapped_ || !page_count_) {
      // There is nothing to unmap.
    } else if (broken_.empty()) {
      driver().cuMemUnmap.status(addresses_.address(), page_count_ * page_bytes());
    } else {  // some are mapped and some are not
      for (const Segment& segment : segments_)
        driver().cuMemUnmap.status(page_address(segment.pages.first), segment.memory.bytes());
      for (const PageRun& run : zero_runs(committed_, page_count_))
        driver().cuMemUnmap.status(page_address(run.first), run.count() * page_bytes());
    }
    segments_.clear();
    ahead_.clear();
    addresses_ = {};
  } catch (const Error&) {
    // The driver is gone, and its memory with it.
  }
}

void TieredRange::need_usable() const {
  driver();
  if (!broken_.empty()) throw Error(ErrorKind::Driver, broken_);
  if (!mapped_) throw Error(ErrorKind::Tier, "the pages of this range are made and not mapped yet");
}

Residency TieredRange::residency() {
  driver();
  std::lock_guard lock(mutex_);
  return residency_;
}

std::uint64_t TieredRange::generation() {
  driver();
  std::lock_guard lock(mutex_);
  return generation_;
}

std::pair<std::size_t, std::size_t> TieredRange::physical_bytes() {
  driver();
  std::lock_guard lock(mutex_);
  std::pair<std::size_t, std::size_t> held;
  for (const Segment& segment : segments_)
    (segment.pages.remote ? held.second : held.first) += segment.memory.bytes();
  for (const Segment& segment : ahead_) held.second += segment.memory.bytes();
  return held;
}

std::size_t TieredRange::remote_bytes_in(std::size_t start, std::size_t stop) {
  driver();
  stop = std::min(stop, nbytes_);
  if (start >= stop) return 0;
  const std::size_t page = page_bytes();
  start += offset_;
  stop += offset_;
  std::lock_guard lock(mutex_);
  std::size_t remote = 0;
  for (const PageRun& run : runs(residency_, start / page, (stop + page - 1) / page))
    if (run.remote) remote += std::min(stop, run.last * page) - std::max(start, run.first * page);
  return remote;
}

std::vector<Segment> TieredRange::make_segments(const std::vector<PageRun>& wanted) const {
  std::vector<std::size_t> sizes[2];
  for (const PageRun& run : wanted) sizes[run.remote].push_back(run.count() * page_bytes());
  std::vector<PhysicalPages> pages[2];
  for (bool remote : {false, true})
    if (!sizes[remote].empty()) pages[remote] = tier_->take(remote, sizes[remote]);
  std::vector<Segment> segments;
  segments.reserve(wanted.size());
  std::size_t next[2] = {0, 0};
  for (const PageRun& run : wanted)
    segments.push_back({run, std::move(pages[run.remote][next[run.remote]++])});
  return segments;
}

void TieredRange::check_bytes(std::size_t count, std::size_t offset) const {
  driver();
  if (offset > nbytes_ || count > nbytes_ - offset)
    throw Error(ErrorKind::Tier, std::to_string(count) + " bytes at " + std::to_string(offset) +
                                     " do not fit a buffer of " + std::to_string(nbytes_) + " bytes");
}

void TieredRange::write(const void* bytes, std::size_t count, std::size_t offset) {
  check_bytes(count, offset);
  std::lock_guard lock(mutex_);
  need_usable();
  need_committed(count, offset);
  DeviceScope scope(tier_->device());
  if (count) copy_in(*tier_, address() + offset, static_cast<const char*>(bytes), count);
}

void TieredRange::write_file(int descriptor, std::size_t position, std::size_t count,
                             std::size_t offset) {
  check_bytes(count, offset);
  std::lock_guard lock(mutex_);
  need_usable();
  need_committed(count, offset);
  DeviceScope scope(tier_->device());
  if (count)
    copy_in_file(*tier_, address() + offset, descriptor, static_cast<off_t>(position), count);
}

// `from` and `to` count from the start of the first page.
std::pair<std::shared_ptr<CpuWindow>, cu::DevicePtr> TieredRange::window_over(std::size_t from,
                                                                             std::size_t to) const {
  std::vector<const Segment*> segments;
  for (const Segment& segment : segments_)
    if (segment.pages.last * page_bytes() > from && segment.pages.first * page_bytes() < to)
      segments.push_back(&segment);
  auto window = CpuWindow::create(tier_, segments);
  const cu::DevicePtr address = window->address() + (from - window->first_page() * page_bytes());
  return {std::move(window), address};
}

std::pair<std::shared_ptr<CpuWindow>, cu::DevicePtr> TieredRange::open_for_cpu(std::size_t start,
                                                                              std::size_t stop) {
  driver();
  std::lock_guard lock(mutex_);
  need_usable();
  DeviceScope scope(tier_->device());
  const std::size_t from = offset_ + start, to = offset_ + stop;
  if (start >= stop || stop > nbytes_)
    throw Error(ErrorKind::Tier, "there are no bytes [" + std::to_string(start) + ", " +
                                     std::to_string(stop) + ") in " + std::to_string(nbytes_));
  need_committed(stop - start, start);
  const auto page = page_bytes();
  for (const PageRun& run : runs(residency_, from / page, (to + page - 1) / page))
    if (!run.remote || !tier_->remote_is_host())
      throw Error(ErrorKind::Tier, "bytes [" + std::to_string(start) + ", " + std::to_string(stop) +
                                       ") are not all in host memory");
  return window_over(from, to);
}

void TieredRange::read(void* bytes, std::size_t count, std::size_t offset) {
  check_bytes(count, offset);
  std::lock_guard lock(mutex_);
  need_usable();
  if (!count) return;
  DeviceScope scope(tier_->device());
  driver().cuMemcpyDtoHAsync(bytes, address() + offset, count, tier_->stream());
  driver().cuStreamSynchronize(tier_->stream());
}

std::vector<std::pair<int, PageRun>> TieredRange::export_host_pages() {
  driver();
  std::lock_guard lock(mutex_);
  need_usable();
  if (!tier_->remote_is_host() || !tier_->place(true).exportable)
    throw Error(ErrorKind::Tier, "only host pages of a GPU that supports it can be exported as files");
  std::vector<std::pair<int, PageRun>> files;
  try {
    for (const Segment& segment : segments_)
      if (segment.pages.remote) files.push_back({export_file(segment.memory), segment.pages});
  } catch (...) {
    for (auto& [descriptor, pages] : files) close(descriptor);
    throw;
  }
  return files;
}

}  // namespace dak
