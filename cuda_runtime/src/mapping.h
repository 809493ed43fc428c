// Mapping runs of allocations, all or nothing.
#pragma once

#include <vector>

#include "range.h"

namespace dak {

struct MapTimes {
  double map_seconds = 0;     // cuMemMap
  double access_seconds = 0;  // cuMemSetAccess
};

// Map allocations that follow one another, the first at `address`, and grant access, one call per run of
// equal tier. After a failure nothing of it is mapped.
MapTimes map_in_order(const Tier& tier, cu::DevicePtr address, const std::vector<const Segment*>& segments,
                      Access access = Access::Devices);

// The segments, for map_in_order.
std::vector<const Segment*> pointers(const std::vector<Segment>& segments);

// Move of `count` bytes between any two places, on the tier's stream; not synchronised.
void copy_async(const Tier& tier, cu::DevicePtr target, cu::DevicePtr source, std::size_t count);

}  // namespace dak
