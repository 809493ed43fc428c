// What the host hands to the linear kernel. lowering/linear/launch.py packs these records.
#pragma once

#include "types.cuh"

namespace dak::linear {

// In device memory, one for each tiered buffer (cuda_runtime/device_records.py).
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

// A weight: rows as they are stored, [out, in] or [in, out].
struct Weight {
  TierRecord* record;
  u64 offset;     // of the weight in its buffer, bytes
  u64 row_bytes;  // from one row to the next
  const void* bias;  // one element for each output feature, or null
};

enum class Activation : u32 { none, silu, gelu, gelu_tanh };

struct Arguments {
  Weight weights[2];  // gate and up; the first alone where the product is not gated
  const u32* window;  // bytes that may be in flight from the remote tier
  void* out;
  const void* residual;  // or null
  u64 out_stride;        // elements from one token to the next
  u64 residual_stride;
  float* partials;  // unfinished sums, a slot for each run that starts within a tile
  u32* flags;       // zero between launches; for each slot, CTA of the cluster and warpgroup
  u32 tokens;      // M
  u32 cta_tokens;  // of each CTA of a cluster; its tile may be wider
  u32 features;    // N, of one weight
  u32 depth;       // K
  Activation activation;
  u32 maximum_remote_workers;
  u32 remote_step_cost;  // in local steps, times 256; 0: remote workers do nothing else
  u32 unused;
};
static_assert(sizeof(Weight) == 32 && sizeof(Arguments) == 152);

}  // namespace dak::linear
