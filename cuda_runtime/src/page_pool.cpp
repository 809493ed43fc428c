#include "page_pool.h"

#include <algorithm>

namespace dak {
namespace {

using namespace std::chrono_literals;

// One thread is as fast as the driver gets with large allocations, and more of them only hold up every other
// call into it; single pages need several threads for that (bench_pages.py --creators).
constexpr std::size_t SMALL_THREADS = 8, LARGE_THREADS = 1;
constexpr std::size_t SMALL_STOCK_BYTES = std::size_t{512} << 20;
constexpr std::size_t LARGE_STOCK_BYTES = std::size_t{1} << 30;
// An announcement that nobody follows up, because a load failed, must not hold memory for good.
constexpr auto IDLE_LIMIT = 10s;

}  // namespace

PagePool::PagePool(const Place& place, int device, std::size_t page_bytes, std::size_t large_bytes)
    : place_(place), device_(device), page_bytes_(page_bytes), large_bytes_(large_bytes) {}

PagePool::~PagePool() {
  if (in_forked_child()) {
    for (std::thread& thread : threads_) thread.detach();  // they exist in the parent only
    return;
  }
  stop();
}

void PagePool::stop() {
  std::vector<std::thread> threads;
  std::vector<PhysicalPages> released;
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    outstanding_ = 0;
    released = excess();
    threads = std::move(threads_);
    wake_.notify_all();
  }
  for (std::thread& thread : threads) thread.join();
  std::vector<PhysicalPages> made_meanwhile;  // released after the lock
  std::lock_guard lock(mutex_);
  made_meanwhile = excess();
}

void PagePool::reserve(std::size_t bytes) {
  driver();
  std::vector<PhysicalPages> released;
  std::lock_guard lock(mutex_);
  outstanding_ = (bytes + page_bytes_ - 1) / page_bytes_ * page_bytes_;
  last_use_ = std::chrono::steady_clock::now();
  if (outstanding_ && threads_.empty() && !stopping_)
    for (std::size_t i = 0; i < SMALL_THREADS + LARGE_THREADS; ++i) threads_.emplace_back([this] { run(); });
  released = excess();
  wake_.notify_all();
}

std::vector<PhysicalPages> PagePool::take(const std::vector<std::size_t>& sizes) {
  driver();
  std::vector<PhysicalPages> pages(sizes.size());
  std::vector<std::size_t> missing;
  std::vector<PhysicalPages> released;
  {
    std::lock_guard lock(mutex_);
    std::size_t total = 0;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      total += sizes[i];
      Stock& stock = stock_[sizes[i]];
      if (stock.empty()) {
        missing.push_back(i);
      } else {
        pages[i] = std::move(stock.back());
        stock.pop_back();
      }
    }
    outstanding_ -= std::min(outstanding_, total);
    last_use_ = std::chrono::steady_clock::now();
    released = excess();
    wake_.notify_all();
  }
  const auto make = [&](bool large, std::size_t threads) {
    std::vector<std::size_t> positions, wanted;
    for (std::size_t i : missing)
      if ((sizes[i] >= large_bytes_) == large) {
        positions.push_back(i);
        wanted.push_back(sizes[i]);
      }
    std::vector<PhysicalPages> made = create_pages(place_, wanted, device_, threads);
    for (std::size_t i = 0; i < positions.size(); ++i) pages[positions[i]] = std::move(made[i]);
  };
  make(false, SMALL_THREADS);
  make(true, LARGE_THREADS);
  return pages;
}

std::size_t PagePool::prepared_bytes() {
  driver();
  std::lock_guard lock(mutex_);
  std::size_t bytes = 0;
  for (auto& [size, stock] : stock_) bytes += size * stock.size();
  return bytes;
}

std::size_t PagePool::held() const {
  std::size_t bytes = 0;
  for (auto& [size, stock] : stock_) bytes += size * stock.size();
  for (auto& [size, count] : in_making_) bytes += size * count;
  return bytes;
}

std::vector<PhysicalPages> PagePool::excess() {
  std::vector<PhysicalPages> released;
  for (auto& [size, stock] : stock_)
    while (!stock.empty() && held() > outstanding_) {
      released.push_back(std::move(stock.back()));
      stock.pop_back();
    }
  return released;
}

std::size_t PagePool::next_size() {
  const std::size_t room = outstanding_ - std::min(outstanding_, held());
  const auto level = [&](std::size_t size) {
    return size * (stock_[size].size() + in_making_[size]);
  };
  const std::size_t small = level(page_bytes_), large = level(large_bytes_);
  const bool large_fits = room >= large_bytes_ && large < LARGE_STOCK_BYTES;
  // Small pages first up to a quarter of their stock, then whichever is lower against its limit.
  if (room >= page_bytes_ && small < SMALL_STOCK_BYTES &&
      (!large_fits || small < SMALL_STOCK_BYTES / 4 || 2 * small <= large))
    return page_bytes_;
  return large_fits && in_making_[large_bytes_] < LARGE_THREADS ? large_bytes_ : 0;
}

void PagePool::run() {
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    const std::size_t size = next_size();
    if (!size) {
      wake_.wait_for(lock, 1s);
      const bool idle = std::chrono::steady_clock::now() - last_use_ > IDLE_LIMIT;
      if (idle && outstanding_) outstanding_ = 0;
      std::vector<PhysicalPages> released = excess();
      if (!released.empty()) {
        lock.unlock();
        released.clear();
        lock.lock();
      }
      continue;
    }
    ++in_making_[size];
    lock.unlock();
    PhysicalPages pages;
    try {
      DeviceScope scope(device_);
      pages = PhysicalPages::create(place_, size);
    } catch (const Error&) {
      // The allocation that needs the page meets the same failure, in a thread that can report it.
    }
    lock.lock();
    --in_making_[size];
    if (pages.bytes())
      stock_[size].push_back(std::move(pages));
    else
      outstanding_ = 0;
  }
}

}  // namespace dak
