// A warpgroup that multiplies what arrives, and finishes tiles.
#pragma once

#include "linear/arguments.cuh"
#include "linear/epilogue.cuh"
#include "linear/layout.cuh"
#include "linear/partial_sums.cuh"
#include "linear/walk.cuh"
#include "pipeline/ring.cuh"
#include "pipeline/wait.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"
#include "tile/accumulator.cuh"
#include "tile/operand.cuh"
#include "types.cuh"

namespace dak::linear {

template <TieredLinearConfiguration configuration>
class Consumer {
  using L = Layout<configuration>;
  using Sums = tile::Accumulator<configuration.tokens>;
  static constexpr u32 blocks = configuration.blocks;
  static constexpr u32 local_phase = 1;
  static constexpr u32 late_phase = 2;
  static constexpr u32 tail_phase = 3;
  static constexpr u32 nothing = ~0u;
  static constexpr u32 settled_steps = 16;  // after which a published piece is surely visible

 public:
  __device__ __forceinline__ Consumer(const Arguments& arguments, Head& head, u8* stages,
                                      u32 rank, u32 ctas, u32 warpgroup, u32 thread)
      : arguments_(arguments),
        head_(head),
        stages_(stages),
        rank_(rank),
        ctas_(ctas),
        warpgroup_(warpgroup),
        thread_(thread),
        partials_{arguments, rank, ctas, warpgroup, thread} {
    if constexpr (configuration.cluster) next_issuer_ = configuration.stages % ctas;
  }

  // All steps of the worker: its remote run, its local run, what it put off, and what its producer
  // claims of the tail, which evens out how long the rest took.
  __device__ __forceinline__ void run() {
    const Assignment& assignment = head_.assignment;
    const bool puts_off = assignment.local.end > assignment.local.begin && !two_lines();
    const u32 phases = L::has_tail && head_.tail.tiles > 0 ? tail_phase + 1 : tail_phase;
#pragma unroll 1
    for (u32 phase = 0; phase < phases; ++phase) {
      const bool claims = L::has_tail && phase == tail_phase;
      const bool remote = phase != local_phase && !claims;
      schedule::Run run = remote ? assignment.remote : assignment.local;
      u32 order = remote ? assignment.remote_run : assignment.local_run;
      const bool resumes = phase == late_phase;
      u32 at = resumes ? kept_at_ : run.begin;  // with nothing put off that is behind every run
#pragma unroll 1
      while (true) {
        if (claims) {
          order = claimed();
          if (order == schedule::Tail::nothing) break;
          run = head_.tail.run(order);
          at = run.begin;
        } else if (at >= run.end) {
          break;
        }
        at = piece(at, run, remote, order, puts_off && remote, resumes, claims);
      }
    }
  }

 private:
  // Where the boundary lies along K a tile begins on the remote line and goes on on the local one.
  __device__ __forceinline__ bool two_lines() const {
    return configuration.in_out && head_.remote.total() > 0;
  }

  // The piece of the tail that comes next.
  __device__ __forceinline__ u32 claimed() const {
    pipeline::wait<configuration.bounded_waits>(&head_.full[position_.stage], position_.parity,
                                                "stage full");
    const u32 piece = head_.claimed[position_.stage];
    // all have read it before one of them gives the stage back
    ptx::named_barrier(1 + warpgroup_, tile::warpgroup_threads);
    return piece;
  }

  // The steps from `at` to the end of the tile or of the run; returns where that is.
  //
  // `puts_off`: what others add to a tile waits until the local run is done: their remote steps take
  // as long as the link does. `resumes`: this is such a tile again. `claims`: the run is piece `order`
  // of the tail.
  __device__ __forceinline__ u32 piece(u32 at, const schedule::Run& run, bool remote, u32 order,
                                       bool puts_off, bool resumes, bool claims) {
    const schedule::Line& line = remote ? head_.remote : head_.local;
    const u32 tile = at / line.steps;
    const u32 tile_end = (tile + 1) * line.steps;
    const u32 end = min(tile_end, run.end);
    const bool divided = claims && end - at < line.steps;  // in pieces that whoever is last adds up
    const bool owned = !divided && at == tile * line.steps && !(two_lines() && !remote);
    const bool shared = owned && end < tile_end;
    // The pieces of others that come at the start of their runs are long there, and adding them first
    // hides behind the copies. Which way depends on sizes alone, as the order of sums must.
    const bool early = shared && !puts_off && at - run.begin > tile_end - end + settled_steps;

    Sums sums[blocks];
#pragma unroll
    for (u32 block = 0; block < blocks; ++block) sums[block].clear();
    if (early) collect(sums, slots(line, remote, tile, order, end, tile_end));
    if (resumes) {
      partials_.add_kept(sums, kept_slot(order));
    } else {
      multiply(sums, end - at);
    }
    if (shared && puts_off && !resumes) {
      partials_.store(sums, kept_slot(order));
      kept_at_ = at;
      return end;
    }
    if (!owned) {
      const u32 target = divided ? tail_slot(order) : slot(remote, order, tile);
      partials_.store(sums, target);
      if (!divided) {
        partials_.publish(target);
        return end;
      }
      if (!partials_.arrives_last(tail_slots(tile))) return end;
#pragma unroll
      for (u32 block = 0; block < blocks; ++block) sums[block].clear();
    }
    if (divided || (shared && !early)) {
      const SlotRange pieces =
          divided ? tail_slots(tile) : slots(line, remote, tile, order, end, tile_end);
      if (!divided) partials_.await(pieces);
      partials_.add(sums, pieces);
    }
    if (two_lines() && head_.local.total() > 0) {
      const u32 begin = tile * head_.local.steps;
      collect(sums, slots(head_.local, false, tile, 0, begin, begin + head_.local.steps));
    }
    write(sums, line.origin + static_cast<int>(tile * L::features));
    return end;
  }

  __device__ __forceinline__ void collect(Sums (&sums)[blocks], const SlotRange& pieces) const {
    partials_.await(pieces);
    partials_.add(sums, pieces);
  }

  // Of the runs that have [begin, end), all of one tile.
  __device__ __forceinline__ SlotRange slots(const schedule::Line& line, bool remote, u32 tile,
                                             u32 guess, u32 begin, u32 end) const {
    const u32 first = line.run_of(begin, guess);
    const u32 last = line.run_of(end - 1, first);
    return {slot(remote, first, tile), last - first + 1};
  }

  // A run leaves one piece behind, its first; along K it leaves one for each tile.
  __device__ __forceinline__ u32 slot(bool remote, u32 order, u32 tile) const {
    if (remote) return order;
    return 2 * arguments_.maximum_remote_workers + order + (configuration.in_out ? tile : 0);
  }

  __device__ __forceinline__ u32 kept_slot(u32 order) const {
    return arguments_.maximum_remote_workers + order;
  }

  // Behind those of all workers.
  __device__ __forceinline__ u32 tail_slot(u32 piece) const {
    return 2 * arguments_.maximum_remote_workers + gridDim.x + piece;
  }

  __device__ __forceinline__ SlotRange tail_slots(u32 tile) const {
    return {tail_slot(head_.tail.first_piece(tile)), head_.tail.pieces};
  }

  __device__ __forceinline__ void multiply(Sums (&sums)[blocks], u32 steps) {
    for (u32 i = 0; i < steps; ++i) {
      pipeline::wait<configuration.bounded_waits>(&head_.full[position_.stage], position_.parity,
                                                  "stage full");
      pipeline::wait<configuration.bounded_waits>(&head_.early[position_.stage], 0,
                                                  "weights of a first stage");
      const u8* weights = stages_ + position_.stage * L::stage_bytes;
      const u64 token_tile = tile::descriptor(weights + L::weight_bytes);
      ptx::wgmma_fence();
#pragma unroll
      for (u32 part = 0; part < L::depth / tile::product_depth; ++part) {
#pragma unroll
        for (u32 block = 0; block < blocks; ++block) {
          using Product =
              ptx::Wgmma<configuration.tokens, configuration.half, configuration.in_out>;
          const u64 weight_tile = tile::descriptor(weights + block_of(block) * L::block_bytes);
          Product::run(sums[block].sums,
                       weight_tile + part * tile::depth_step<!configuration.in_out>,
                       token_tile + part * tile::depth_step<true>);
        }
      }
      ptx::wgmma_commit_group();
      // the other warpgroup's products fill the gap; the stage is wanted back
      ptx::wgmma_wait_group<0>();
      release();
    }
  }

  // Blocks of a stage: those of the gate weight come first.
  __device__ __forceinline__ u32 block_of(u32 block) const {
    return configuration.gated ? block * consumer_warpgroups + warpgroup_
                               : warpgroup_ * blocks + block;
  }

  // The products that read the stage have ended: one thread tells its CTA, another the cluster.
  __device__ __forceinline__ void release() {
    if (thread_ == 0) ptx::mbarrier_arrive(&head_.empty[position_.stage]);
    if constexpr (configuration.cluster) {
      if (thread_ == 32) {
        ptx::mbarrier_arrive_cluster(&head_.cluster_empty[position_.stage], next_issuer_);
      }
      if (++next_issuer_ == ctas_) next_issuer_ = 0;
    }
    position_.advance(configuration.stages);
  }

  __device__ __forceinline__ void write(const Sums (&sums)[blocks], int tile_feature) const {
    float* turn = reinterpret_cast<float*>(stages_ + configuration.stages * L::stage_bytes +
                                           warpgroup_ * L::turn_bytes);
    const u32 token = rank_ * arguments_.cta_tokens;
#pragma unroll
    for (u32 block = 0; block < blocks / L::weights; ++block) {
      const int feature = tile_feature + static_cast<int>(block_of(block) * 64);
      const Epilogue<configuration> epilogue(arguments_, turn, feature, token, warpgroup_, thread_);
      epilogue.write(sums[block], sums[blocks - 1]);
    }
  }

  const Arguments& arguments_;
  Head& head_;
  u8* const stages_;
  const u32 rank_;
  const u32 ctas_;
  const u32 warpgroup_;  // of the consumers
  const u32 thread_;     // in the warpgroup
  const PartialSums<configuration> partials_;
  pipeline::RingPosition position_{};
  u32 kept_at_ = nothing;  // where the tile that was put off begins in the remote run
  u32 next_issuer_ = 0;  // the CTA that loads weights into the current stage next time
};

}  // namespace dak::linear
