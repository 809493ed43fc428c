// Host pages made ahead of need. Clearing and pinning a page takes longer than mapping and filling it
// (benchmarks/bench_pages.py measures all three), so a load is as fast as its pages are made.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "physical.h"

namespace dak {

class PagePool {
 public:
  // `device` is the GPU in whose context the threads work; `page_bytes` and `large_bytes` are the two
  // sizes kept in stock.
  PagePool(const Place& place, int device, std::size_t page_bytes, std::size_t large_bytes);
  ~PagePool();

  // `bytes` will be taken from now on: keep that much less what has been taken ready, in stocks of at
  // most STOCK_BYTES. Replaces an earlier announcement; 0 releases the stock.
  void reserve(std::size_t bytes);

  // Allocations of these sizes (multiples of page_bytes), from stock where it has them, else made now.
  // Throws HostMemory, with everything given back.
  std::vector<PhysicalPages> take(const std::vector<std::size_t>& sizes);

  // Release the stock and end the threads; pages are then made as they are taken.
  void stop();

  // Bytes in stock, which nobody owns yet.
  std::size_t prepared_bytes();

 private:
  using Stock = std::vector<PhysicalPages>;

  void run();
  std::size_t next_size();  // size to make now, 0 for none; under the lock
  std::size_t held() const;
  std::vector<PhysicalPages> excess();

  const Place place_;
  const int device_;
  const std::size_t page_bytes_, large_bytes_;

  std::mutex mutex_;
  std::condition_variable wake_;
  std::map<std::size_t, Stock> stock_;           // by size
  std::map<std::size_t, std::size_t> in_making_;  // by size, allocations
  std::size_t outstanding_ = 0;                  // announced and not taken yet
  std::chrono::steady_clock::time_point last_use_;
  std::vector<std::thread> threads_;
  bool stopping_ = false;
};

}  // namespace dak
