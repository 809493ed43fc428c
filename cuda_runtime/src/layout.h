// Which pages of a range lie where, and in allocations of what size. Arithmetic only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dak {

// One entry per page: 1 if it is remote.
using Residency = std::vector<std::uint8_t>;

struct PageRun {
  std::size_t first, last;  // pages [first, last)
  bool remote = false;

  std::size_t count() const { return last - first; }
};

// Maximal runs of one tier within pages [first, last).
std::vector<PageRun> runs(const Residency& residency, std::size_t first, std::size_t last);

// The allocations that pages [first, last) are made of: one page each within NEAR_PAGES of a place where
// the tier changes, since an allocation cannot be unmapped in part; large ones elsewhere.
std::vector<PageRun> allocations(const Residency& residency, std::size_t first, std::size_t last);

// Pages [0, local) local, the rest of `pages` remote.
Residency prefix(std::size_t local, std::size_t pages);

}  // namespace dak
