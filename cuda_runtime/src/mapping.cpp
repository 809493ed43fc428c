#include "mapping.h"

#include "stopwatch.h"

namespace dak {

MapTimes map_in_order(const Tier& tier, cu::DevicePtr address,
                      const std::vector<const Segment*>& segments, Access access) {
  const Driver& cuda = driver();
  MapTimes times;
  Stopwatch watch;
  std::size_t mapped = 0;
  try {
    for (const Segment* segment : segments) {
      cuda.cuMemMap(address + mapped, segment->memory.bytes(), 0, segment->memory.handle(), 0);
      mapped += segment->memory.bytes();
    }
    times.map_seconds = watch.lap();
    std::size_t start = 0;
    for (std::size_t i = 0; i < segments.size();) {
      const bool remote = segments[i]->pages.remote;
      std::size_t bytes = 0;
      while (i < segments.size() && segments[i]->pages.remote == remote)
        bytes += segments[i++]->memory.bytes();
      tier.grant_access(address + start, bytes, access);
      start += bytes;
    }
    times.access_seconds = watch.lap();
    return times;
  } catch (...) {
    if (mapped) cuda.cuMemUnmap.status(address, mapped);
    throw;
  }
}

std::vector<const Segment*> pointers(const std::vector<Segment>& segments) {
  std::vector<const Segment*> found;
  for (const Segment& segment : segments) found.push_back(&segment);
  return found;
}

void copy_async(const Tier& tier, cu::DevicePtr target, cu::DevicePtr source, std::size_t count) {
  driver().cuMemcpyAsync(target, source, count, tier.stream());
}

}  // namespace dak
