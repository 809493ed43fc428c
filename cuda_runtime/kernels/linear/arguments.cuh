// What the host hands to the linear kernel. lowering/linear/launch.py packs these records.
#pragma once

#include "schedule/tail.cuh"
#include "schedule/tier_record.cuh"
#include "types.cuh"
#include "window/record.cuh"

namespace dak::linear {

// A weight: rows as they are stored, [out, in] or [in, out].
struct Weight {
  schedule::TierRecord* record;
  u64 offset;     // of the weight in its buffer, bytes
  u64 row_bytes;  // from one row to the next
  const void* bias;  // one element for each output feature, or null
};

enum class Activation : u32 { none, silu, gelu, gelu_tanh };

// Rows copied ahead, by copy engine into a ring in device memory, are read there. Then nothing is
// read from the remote tier, but for what has become remote since the launch was captured.
struct Arguments {
  Weight weights[2];  // gate and up; the first alone where the product is not gated
  window::Record* link;  // bytes that may be in flight from the remote tier
  window::LaunchWindow* launch;  // null: the host fixes them
  void* out;
  const void* residual;  // or null
  u64 out_stride;        // elements from one token to the next
  u64 residual_stride;
  float* partials;  // unfinished sums: slots of the runs, then of the pieces of the tail
  u32* flags;       // zero between launches; for each slot, CTA of the cluster and warpgroup
  u32* claims;      // zero between launches; counts the claims of the tail's pieces
  u32 tokens;      // M
  u32 cta_tokens;  // of each CTA of a cluster; its tile may be wider
  u32 features;    // N, of one weight
  u32 depth;       // K
  Activation activation;
  u32 maximum_remote_workers;
  u32 worker_bytes;    // that a remote worker may have on their way
  float link_steps;    // local steps that the link takes for a byte,
  float reader_steps;  // and that one worker takes alone
  float piece_steps;   // local steps that adding up a piece of a tile takes
  float few_steps;     // local steps that a step of a tile that lacks rows takes a worker at least
  u32 late_steps;      // that the worker started last is behind
  schedule::TailRule tail;  // of the local line
  u32 copied[2];  // of each weight the first feature that lies in the ring, of both the same; N: none
};
static_assert(sizeof(Weight) == 32 && sizeof(Arguments) == 208);

}  // namespace dak::linear
