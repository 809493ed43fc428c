// One address range in two memories: created, moved in place, freed after its last user.
#pragma once

#include <cstdint>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "layout.h"
#include "tier.h"

namespace dak {

// Part of a range: one allocation and the pages it backs.
struct Segment {
  PageRun pages;
  PhysicalPages memory;
};

struct MoveTimes {
  double prepare_seconds = 0;  // making and mapping the new pages, where that was not done ahead
  double copy_seconds = 0;
  double remap_seconds = 0;
  double release_seconds = 0;  // giving back what was local; host pages are given back in the background
  std::size_t bytes_copied = 0;
  bool prepared_ahead = false;
};

// What making a range took.
struct MakeTimes {
  double create_seconds = 0;  // cuMemCreate, or taking from stock
  double map_seconds = 0;     // cuMemMap
  double access_seconds = 0;  // cuMemSetAccess
};

class CpuWindow;

class TieredRange {
 public:
  // Bytes [0, split) local. `split` is 0, nbytes, or a multiple of 256 between: byte 0 then lies off a
  // page boundary so that the split is on one. The range is freed through the reaper.
  static std::shared_ptr<TieredRange> create(std::shared_ptr<Tier> tier, std::size_t nbytes,
                                             std::size_t split);
  // `create` in two steps, so that one thread can make pages while another maps those made before. Until
  // map() has returned the range can be destroyed and nothing else.
  static std::shared_ptr<TieredRange> make(std::shared_ptr<Tier> tier, std::size_t nbytes, std::size_t split);
  void map();
  // A range whose pages read as zeros and may not be written until grow() has given them memory.
  static std::shared_ptr<TieredRange> create_growing(std::shared_ptr<Tier> tier, std::size_t nbytes,
                                                     std::size_t split);
  MakeTimes make_times() const { return make_times_; }
  ~TieredRange();
  TieredRange(const TieredRange&) = delete;

  const std::shared_ptr<Tier>& tier() const { return tier_; }
  std::size_t nbytes() const { return nbytes_; }
  cu::DevicePtr address() const { return addresses_.address() + offset_; }  // of byte 0
  std::size_t page_count() const { return page_count_; }
  std::size_t page_bytes() const { return tier_->page_bytes(); }

  Residency residency();
  std::uint64_t generation();
  // Bytes of pages held, local and remote, those made ahead among them.
  std::pair<std::size_t, std::size_t> physical_bytes();
  // Bytes of [start, stop) that are remote.
  std::size_t remote_bytes_in(std::size_t start, std::size_t stop);

  // Make the pages that a move to `target` needs, in the background. A later move to another target drops
  // them, as does cancel. `finish` waits until they are there.
  void prepare_in_background(Residency target);
  void finish_preparation();
  void cancel_preparation();

  // Make `target` the residency, address and contents kept. The caller guarantees that no work on the range
  // is in flight. Throws Move after any failure; the old state stands.
  MoveTimes move(const Residency& target);

  // Give the first `pages` pages memory of their own, zeroed; more than that, in whole blocks. The caller
  // guarantees that no work on the range is in flight. After any failure the old state stands.
  void grow(std::size_t pages);
  std::size_t committed_pages();
  // Bytes of the pages that grow(pages) would make, local and remote: those made ahead are not among them.
  std::pair<std::size_t, std::size_t> growth(std::size_t pages);

  // Make the next allocation of remote pages that grow(pages) will need, cleared and not mapped: what lies at
  // their addresses until then may be read by work in flight. Returns its bytes, 0 where all are made. One
  // allocation a call, so that the caller can stop between two. Safe while work is in flight and captures are
  // open. Throws HostMemory, DeviceMemory or Driver; then nothing is held.
  std::size_t make_ahead(std::size_t pages);
  std::size_t next_ahead(std::size_t pages);  // bytes that make_ahead(pages) would make
  void drop_ahead();                          // give them back, in the background
  std::size_t ahead_pages();                  // grow() up to here makes no remote page
  std::size_t ahead_bytes();

  // Copy bytes in or out, synchronously; `bytes` may be any CPU memory. `position` is the first byte's in the
  // file.
  void write(const void* bytes, std::size_t count, std::size_t offset);
  void write_file(int descriptor, std::size_t position, std::size_t count, std::size_t offset);
  void read(void* bytes, std::size_t count, std::size_t offset);

  // The CPU's own mapping of the host pages that hold bytes [start, stop), all of them remote, and the
  // address of byte `start` in it.
  std::pair<std::shared_ptr<CpuWindow>, cu::DevicePtr> open_for_cpu(std::size_t start, std::size_t stop);

  // Host allocations as file descriptors (the caller closes them): descriptor and pages.
  std::vector<std::pair<int, PageRun>> export_host_pages();
  std::size_t offset() const { return offset_; }  // of byte 0 in the first page

 private:
  // New allocations for pages whose tier changes, and for the rest of the allocations those lie in.
  struct Patch {
    PageRun pages;
    std::vector<Segment> replacement;  // in order; mapped at `staging` too
    AddressRange staging;
    bool staged = false;
  };
  struct Preparation {
    Residency target;
    std::vector<Patch> patches;
  };

  TieredRange(std::shared_ptr<Tier> tier, std::size_t nbytes, std::size_t split, bool growing);
  static std::shared_ptr<TieredRange> make_any(std::shared_ptr<Tier> tier, std::size_t nbytes, std::size_t split,
                                               bool growing);

  // Mappings of zeros that pages [first, last) consist of; `first` is the start of one.
  std::vector<PageRun> zero_runs(std::size_t first, std::size_t last) const;
  void map_zeros(std::size_t first, std::size_t last);
  std::size_t block_end(std::size_t pages) const;
  std::size_t growth_end(std::size_t pages) const;
  std::vector<PageRun> missing(std::size_t end, std::size_t taken) const;
  void map_grown(std::size_t end, const std::vector<const Segment*>& added, const std::vector<Segment>& made);
  std::size_t taken_ahead(std::size_t end) const;
  std::optional<PageRun> next_run(std::size_t pages) const;
  void need_committed(std::size_t count, std::size_t offset) const;

  cu::DevicePtr page_address(std::size_t page) const {
    return addresses_.address() + page * page_bytes();
  }
  void need_usable() const;
  void check_bytes(std::size_t count, std::size_t offset) const;
  std::vector<Segment> make_segments(const std::vector<PageRun>& wanted) const;
  Preparation prepare(const Residency& target) const;
  std::vector<PageRun> affected(const Residency& target) const;
  std::size_t copy_to_staging(const Preparation& preparation) const;
  void remap(const Preparation& preparation);
  std::vector<const Segment*> segments_in(const PageRun& pages) const;
  std::pair<std::shared_ptr<CpuWindow>, cu::DevicePtr> window_over(std::size_t from, std::size_t to) const;
  void restore(const Preparation& preparation, std::size_t unmapped, std::size_t replaced,
               const std::string& cause);
  std::vector<Segment> commit(Preparation& preparation);
  static void unstage(std::vector<Patch>& patches) noexcept;

  const std::shared_ptr<Tier> tier_;
  const std::size_t nbytes_;
  std::size_t offset_ = 0, page_count_ = 0;
  AddressRange addresses_;

  std::mutex mutex_;
  std::vector<Segment> segments_;  // in order, covering every committed page
  std::size_t committed_ = 0;      // pages with memory of their own, a prefix
  std::size_t block_pages_ = 1;    // of a mapping of zeros, but for those at the end
  std::shared_ptr<const PhysicalPages> zero_block_, zero_page_;
  std::vector<Segment> ahead_;     // remote pages that grow() takes, in order
  std::uint64_t ahead_epoch_ = 0;  // changes with what is to be made next
  Residency residency_;
  std::uint64_t generation_ = 0;
  bool mapped_ = false;
  MakeTimes make_times_;
  std::string broken_;  // why the range cannot be used any more; empty while it can
  std::optional<Preparation> prepared_;
  std::mutex preparing_mutex_;  // taken before mutex_
  std::future<void> preparing_;
};

}  // namespace dak
