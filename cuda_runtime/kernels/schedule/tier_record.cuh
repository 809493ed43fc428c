// What the runtime keeps of a tiered buffer in device memory (cuda_runtime/device_records.py).
#pragma once

#include "types.cuh"

namespace dak::schedule {

struct TierRecord {
  u64 split;  // bytes [0, split) of the buffer are local
  u64 local_bytes;
  u64 remote_bytes;
  u64 calls;
  u64 peak_window;
  u64 address;  // of the buffer and of its link's window: what kernels of other make read
  u64 window;
  u64 unused;
};
static_assert(sizeof(TierRecord) == 64);

}  // namespace dak::schedule
