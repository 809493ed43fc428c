// Sizes that follow from a configuration of the linear kernel.
#pragma once

#include "ptx/mbarrier.cuh"
#include "schedule/line.cuh"
#include "schedule/tail.cuh"
#include "tile/operand.cuh"
#include "types.cuh"

namespace dak {

struct TieredLinearConfiguration {
  u32 tokens;  // columns of a CTA's tile: 8, 16, 32, 64, 128 or 256
  u32 blocks;  // of 64 weight rows for each consumer warpgroup: 1 or 2
  u32 stages;
  u32 ctas_per_sm;     // 2: the next launch of this kernel starts beside this one
  bool cluster;        // CTAs of a cluster share the weight tiles, each has tokens of its own
  bool gated;          // two weights; takes 2 blocks, one of each
  bool in_out;         // weights are stored [in, out]
  bool half;           // fp16, else bf16
  bool bounded_waits;  // barriers that never complete end the kernel with their name
};

namespace linear {

constexpr u32 consumer_warpgroups = 2;
constexpr u32 threads = 128 * (consumer_warpgroups + 1);
constexpr u32 element_bytes = 2;
constexpr u32 maximum_stages = 16;

// Where the remote part of a weight begins, in elements of its stored rows.
struct Boundary {
  u32 row;     // the first row that is not all local
  u32 column;  // of that row, the first element that is remote
};

// The runs of a worker, and their numbers on the lines. In shared memory, since no thread has
// registers to spare for them.
struct Assignment {
  u32 remote_run;
  u32 local_run;
  schedule::Run remote;
  schedule::Run local;

  __device__ __forceinline__ u32 steps() const {
    return remote.end - remote.begin + local.end - local.begin;
  }
};

// The head of shared memory; the stages follow at `head_bytes`.
struct Head {
  ptx::mbarrier_t full[maximum_stages];
  // of the first steps, the weights alone: those come before their tokens can be asked for. One phase
  ptx::mbarrier_t early[maximum_stages];
  ptx::mbarrier_t empty[maximum_stages];
  ptx::mbarrier_t cluster_empty[maximum_stages];
  ptx::mbarrier_t undisturbed;  // the kernels ahead have ended
  schedule::Line remote;
  schedule::Line local;
  schedule::Tail tail;  // of the local line
  Assignment assignment;
  u32 claimed[maximum_stages];  // the piece of the tail that begins in a stage
  Boundary boundaries[2];
  u32 remote_workers;
  u32 spared;        // workers, the last ones, that have claims alone
  u32 quota;         // stages that each remote worker may have in flight,
  u32 last_quota;    // and of the last tile,
  int last_feature;  // which begins here
  u32 in_flight;     // remote bytes, at most, of all workers together
  u32 controlled;    // window::Reading
  u32 issued[maximum_stages];  // window::Delays' marks of remote steps
};

constexpr u32 head_bytes = 1024;
static_assert(sizeof(Head) <= head_bytes);

template <TieredLinearConfiguration configuration>
struct Layout {
  static constexpr u32 block_bytes = 64 * tile::row_bytes;
  static constexpr u32 blocks = consumer_warpgroups * configuration.blocks;
  static constexpr u32 rows = 64 * blocks;  // of weights in a stage
  static constexpr u32 weights = configuration.gated ? 2 : 1;
  static constexpr u32 features = rows / weights;  // output features of a tile
  static constexpr u32 weight_bytes = blocks * block_bytes;
  static constexpr u32 token_bytes = configuration.tokens * tile::row_bytes;
  static constexpr u32 stage_bytes = weight_bytes + token_bytes;
  // Sums that turn around in the epilogue: some tokens by 64 features, fp32, for each warpgroup.
  static constexpr u32 turn_most = configuration.gated ? 16 : 32;
  static constexpr u32 turn_tokens =
      configuration.tokens < turn_most ? configuration.tokens : turn_most;
  static constexpr u32 turn_pitch = 68;
  static constexpr u32 turn_elements = turn_tokens * turn_pitch;  // of one weight
  static constexpr u32 turn_bytes = weights * turn_elements * 4;
  static constexpr u32 shared_bytes = head_bytes + configuration.stages * stage_bytes +
                                      consumer_warpgroups * turn_bytes;
  static constexpr u32 depth = tile::columns;  // of a step along K
  // fp32 sums of a partial tile of one CTA
  static constexpr u32 partial_elements = rows * configuration.tokens;
  // Of the local line. Clusters are bound by operations, not by their share of bandwidth; where the
  // boundary lies along K each tile waits for both lines; and pieces of more than 64 KiB of sums take
  // as long to add up as a tail could win. lowering/linear/tail.py has the same rule.
  static constexpr bool has_tail = !configuration.cluster && !configuration.in_out &&
                                   configuration.blocks * configuration.tokens <= 128;

  // Whose delays say something about the link. In a cluster a CTA waits for the copies of others; two
  // CTAs to an SM are for weights that are all local.
  static constexpr bool observes = !configuration.cluster && configuration.ctas_per_sm == 1;

  static_assert(configuration.stages >= 2 && configuration.stages <= maximum_stages);
  static_assert(configuration.blocks == 1 || configuration.blocks == 2);
  static_assert(!configuration.gated || configuration.blocks == 2);
  static_assert(stage_bytes % tile::atom_bytes == 0);
  // of 228 KiB, 1 for each CTA is the system's
  static_assert(configuration.ctas_per_sm * (shared_bytes + 1024) <= 228 * 1024);
};

// Arrivals that complete a phase of each barrier, from who arrives there.
struct Arrivals {
  static constexpr u32 full = 1;   // who asks for the stage's tokens, and announces bytes
  static constexpr u32 early = 1;  // the producer, likewise
  static constexpr u32 undisturbed = 1;
  static constexpr u32 empty = consumer_warpgroups;  // one thread of each
  static __device__ __forceinline__ u32 cluster_empty(u32 ctas) {
    return consumer_warpgroups * ctas;
  }
};

}  // namespace linear
}  // namespace dak
