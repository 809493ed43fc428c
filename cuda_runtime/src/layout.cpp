#include "layout.h"

#include <algorithm>

#include "tier.h"

namespace dak {

std::vector<PageRun> runs(const Residency& residency, std::size_t first, std::size_t last) {
  std::vector<PageRun> found;
  for (std::size_t page = first; page < last;) {
    std::size_t end = page + 1;
    while (end < last && residency[end] == residency[page]) ++end;
    found.push_back({page, end, residency[page] != 0});
    page = end;
  }
  return found;
}

std::vector<PageRun> allocations(const Residency& residency, std::size_t first, std::size_t last) {
  std::vector<PageRun> found;
  const std::size_t pages = residency.size();
  for (const PageRun& run : runs(residency, first, last)) {
    // The run as it is in the whole range: where it is cut by [first, last) the tier does not change.
    std::size_t start = run.first, end = run.last;
    while (start > 0 && residency[start - 1] == residency[run.first]) --start;
    while (end < pages && residency[end] == residency[run.first]) ++end;
    const std::size_t small_until = start > 0 ? std::min(start + NEAR_PAGES, end) : start;
    const std::size_t small_from = end < pages ? std::max(end - std::min(NEAR_PAGES, end), start) : end;
    for (std::size_t page = run.first; page < run.last;) {
      std::size_t count = SMALL_HANDLE_PAGES;
      if (page >= small_until && page < small_from)
        count = std::min({LARGE_HANDLE_PAGES, small_from - page, run.last - page});
      found.push_back({page, page + count, run.remote});
      page += count;
    }
  }
  return found;
}

Residency prefix(std::size_t local, std::size_t pages) {
  Residency residency(pages, 1);
  std::fill_n(residency.begin(), std::min(local, pages), std::uint8_t{0});
  return residency;
}

}  // namespace dak
