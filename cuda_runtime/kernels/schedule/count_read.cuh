// Adds what a stock kernel, or a copy, reads of a tiered buffer to its record: by the split of the
// moment.
#pragma once

#include "schedule/tier_record.cuh"
#include "types.cuh"

namespace dak::schedule {

// Of bytes [start, start + size) of the buffer, those that are local.
__device__ __forceinline__ u64 local_bytes(u64 split, u64 start, u64 size) {
  return split <= start ? 0 : split - start < size ? split - start : size;
}

__device__ __forceinline__ void count(TierRecord* record, u64 local, u64 all, u64 calls) {
  if (local > 0) atomicAdd(&record->local_bytes, local);
  if (all > local) atomicAdd(&record->remote_bytes, all - local);
  if (calls > 0) atomicAdd(&record->calls, calls);
}

}  // namespace dak::schedule
