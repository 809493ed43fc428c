// The two memories of a tiered range, and how pages of both are made accessible.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "page_pool.h"
#include "physical.h"

namespace dak {

inline constexpr std::size_t SMALL_HANDLE_PAGES = 1;
inline constexpr std::size_t LARGE_HANDLE_PAGES = 16;  // 32 MiB: larger ones are made no faster (bench_pages.py)
inline constexpr std::size_t NEAR_PAGES = 32;          // within 64 MiB of a split, handles are small
// A range that grows is mapped in blocks of up to 32 MiB, so that a large one takes few calls, and in no fewer
// than this many of them, so that it grows in small steps.
inline constexpr std::size_t MOST_BLOCK_PAGES = 16, BLOCKS_PER_RANGE = 64;

enum class Access { Devices, Cpu };

// Local memory of `device` and one remote tier: host DRAM, or another device's HBM.
class Tier {
 public:
  // peer < 0: host memory of the NUMA node nearest to `device`, which a CpuWindow reaches by locations of
  // type `host_access` (HOST_NUMA where the driver takes it, else HOST). Throws UnsupportedDriver where the
  // device lacks virtual memory management, Tier where the peer cannot be reached.
  Tier(int device, int peer, cu::LocationType host_access);
  ~Tier();
  Tier(const Tier&) = delete;

  int device() const { return device_; }
  bool remote_is_host() const { return peer_ < 0; }
  std::vector<int> devices() const;  // whose work may touch the pages
  const Place& place(bool remote) const { return remote ? remote_ : local_; }
  std::size_t page_bytes() const { return page_bytes_; }
  cu::Stream stream() const { return stream_; }  // for copies of our own; not blocking
  PagePool* pool() { return pool_.get(); }       // null for a peer

  // Physical memory in these sizes. Where HBM runs out, waits for what is being freed and tries again.
  std::vector<PhysicalPages> take(bool remote, const std::vector<std::size_t>& sizes);

  // Let the devices read and write mapped pages of one tier; with Access::Cpu the CPU too (host pages).
  void grant_access(cu::DevicePtr address, std::size_t bytes, Access access) const;

  // Fill an allocation that is mapped nowhere with zeros, done on return.
  void clear(const PhysicalPages& pages) const;

  // A local allocation of zeros, the same one for all who ask for this size while one of them holds it. It is
  // mapped where a range has no memory of its own yet, so nobody may write to it.
  std::shared_ptr<const PhysicalPages> zeros(std::size_t bytes);
  // Let the devices read mapped pages. Where the driver refuses that, they may write to them too.
  void grant_reading(cu::DevicePtr address, std::size_t bytes) const;

 private:
  const int device_, peer_;
  Place local_, remote_;
  std::vector<cu::MemAccessDesc> access_[2];  // by Access
  std::size_t page_bytes_ = 0;
  cu::Stream stream_ = nullptr;
  std::unique_ptr<PagePool> pool_;
  std::mutex zeros_mutex_;
  std::map<std::size_t, std::weak_ptr<const PhysicalPages>> zeros_;  // by size
};

}  // namespace dak
