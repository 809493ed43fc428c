// The threads that keep tiles of weights and tokens in flight into shared memory.
#pragma once

#include "linear/arguments.cuh"
#include "linear/claims.cuh"
#include "linear/layout.cuh"
#include "linear/plan.cuh"
#include "linear/walk.cuh"
#include "pipeline/ring.cuh"
#include "pipeline/wait.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tensor_copy.cuh"
#include "ptx/timer.cuh"
#include "types.cuh"
#include "window/delays.cuh"

namespace dak::linear {

constexpr u32 rows_at_least = 8;  // an atom of the swizzle
constexpr u32 row_boxes = 4;

// Rows of a weight in boxes as high as a tile, and of 8, 16, 32 and 64 for tiles that lack rows.
// Those are unused for [in, out].
struct RowMaps {
  ptx::TensorMap tile;
  ptx::TensorMap boxes[row_boxes];
};

struct TensorMaps {
  const RowMaps* weights[2];
  const ptx::TensorMap* ring[2];  // the rows from Arguments::copied on, in boxes as high as a tile
  const ptx::TensorMap* tokens;
};

// The features of a tile that exist: [begin, end), multiples of 8.
struct Extent {
  u32 begin;
  u32 end;

  template <u32 Features>
  static __device__ __forceinline__ Extent of_tile(int feature, u32 features) {
    const int left = static_cast<int>(features) - feature;
    return {feature < 0 ? static_cast<u32>(-feature) : 0, min(Features, static_cast<u32>(left))};
  }

  __device__ __forceinline__ u32 rows() const { return end - begin; }
};

// A step of the walk and what of its tile exists.
//
// A local tile is one box for each weight: rows outside of the matrix arrive as zeros. In boxes of just
// the rows that exist, each box after the first took 0.2 us of a step. A remote tile is in such boxes:
// with 24 of 128 rows inside a remote matrix, whole boxes ran at a fifth of their rate. Their stale rows
// end up in results that are not written.
struct Load {
  Step step;
  Extent extent;
};

template <TieredLinearConfiguration configuration>
class Producer {
  using L = Layout<configuration>;
  static constexpr bool bounded = configuration.bounded_waits;

 public:
  __device__ __forceinline__ Producer(const Arguments& arguments, const TensorMaps& maps,
                                      Head& head, u8* stages, u32 rank, u32 ctas)
      : arguments_(arguments), maps_(maps), head_(head), stages_(stages), rank_(rank), ctas_(ctas) {}

  // All steps of the worker, then pieces of the tail until there are none left.
  //
  // Weights are constant, so those of the first stages are asked for before the kernels that make the
  // tokens have ended. From a remote tier they take long, so another thread brings the tokens.
  __device__ __forceinline__ void run() {
    const u32 total = head_.assignment.steps();
    const u32 ahead = ahead_ = first_stages();
    Walk weights(head_, L::features);
    for (u32 i = 0; i < ahead; ++i) {
      const Load next = locate(weights.next());
      ptx::mbarrier_arrive_expect_tx(&head_.early[i], bytes_of_weights(next));
      take_turn(next, i, i, &head_.early[i]);
    }
    for (u32 i = ahead; i < configuration.stages; ++i) ptx::mbarrier_arrive(&head_.early[i]);
    ptx::wait_for_predecessors();
    undisturbed_ = true;

    pipeline::RingPosition position{ahead % configuration.stages,
                                    ahead / configuration.stages & 1};
    Claims claims(head_.tail, arguments_.claims, gridDim.x);
    u32 end = total;  // of the runs, then of a piece
    u32 asks_at = Claims::asks_at(ahead, end);
    if (L::has_tail && asks_at == end) claims.ask();
    u32 piece = schedule::Tail::nothing;
    for (u32 i = ahead;; ++i) {
      const bool ends = i == end;
      if (ends) {
        if constexpr (!L::has_tail) break;
        piece = claims.take();
        if (piece == schedule::Tail::nothing) break;
        const schedule::Run run = head_.tail.run(piece);
        weights.go_on_at(run.begin);
        end = i + run.end - run.begin;
        asks_at = Claims::asks_at(i, end);
      }
      if (L::has_tail && i == asks_at) claims.ask();
      pipeline::wait<bounded>(&head_.empty[position.stage], position.parity ^ 1, "stage empty");
      if (L::has_tail && ends) head_.claimed[position.stage] = piece;
      const Load next = locate(weights.next());
      ptx::mbarrier_t* full = &head_.full[position.stage];
      ptx::mbarrier_arrive_expect_tx(full, bytes_of_weights(next) + bytes_of_tokens());
      take_turn(next, i, position.stage, full);
      load_tokens(next.step.depth, position.stage);
      position.advance(configuration.stages);
    }
    if (L::has_tail && head_.tail.tiles > 0) end_tail(position);
    report();
  }

  // What goes with the weights of the first stages. Of another thread than `run`.
  __device__ __forceinline__ void bring_first_tokens() {
    Walk tokens(head_, L::features);
    ptx::wait_for_predecessors();
    ptx::mbarrier_arrive(&head_.undisturbed);
    const u32 ahead = first_stages();
    for (u32 i = 0; i < ahead; ++i) {
      ptx::mbarrier_arrive_expect_tx(&head_.full[i], bytes_of_tokens());
      load_tokens(tokens.next().depth, i);
    }
  }

 private:
  __device__ __forceinline__ Load locate(const Step& step) const {
    return {step, Extent::of_tile<L::features>(step.feature, arguments_.features)};
  }

  // A stage that brings nothing but the word that there is nothing more to claim.
  __device__ __forceinline__ void end_tail(const pipeline::RingPosition& position) const {
    pipeline::wait<bounded>(&head_.empty[position.stage], position.parity ^ 1, "stage empty");
    head_.claimed[position.stage] = schedule::Tail::nothing;
    ptx::mbarrier_arrive(&head_.full[position.stage]);
  }

  // Those that the worker's first steps come to. Two threads fill them.
  __device__ __forceinline__ u32 first_stages() const {
    return min(head_.assignment.steps(), configuration.stages);
  }

  __device__ __forceinline__ u32 bytes_of_tokens() const {
    return arguments_.cta_tokens * tile::row_bytes;
  }

  __device__ __forceinline__ static u32 bytes_of_weights(const Load& load) {
    if constexpr (configuration.in_out) {
      return L::weights * blocks_in(load.extent) * L::block_bytes;
    } else {
      const u32 rows = load.step.remote ? load.extent.rows() : L::features;
      return L::weights * rows * tile::row_bytes;
    }
  }

  // Of 64 features; [in, out] tiles begin at feature 0, so only the last blocks may be missing.
  __device__ __forceinline__ static u32 blocks_in(const Extent& rows) {
    return divide_up(rows.end, 64);
  }

  // Loads the weights of step `i`, where it is this CTA's turn to load for the cluster.
  __device__ __forceinline__ void take_turn(const Load& next, u32 i, u32 stage,
                                            ptx::mbarrier_t* arrival) {
    if constexpr (configuration.cluster) {
      const bool mine = turn_ == rank_;
      if (++turn_ == ctas_) turn_ = 0;
      if (!mine) return;
      if (i >= configuration.stages) {
        pipeline::wait<bounded, pipeline::Scope::cluster>(
            &head_.cluster_empty[stage], cluster_parities_ >> stage & 1, "stage empty in cluster");
        cluster_parities_ ^= 1u << stage;
      }
    }
    if (next.step.remote) keep_window(next.step, i);
    const u32 now = L::observes && next.step.remote ? ptx::cycles() : 0;
    load_weights(next, stage, arrival);
    const bool far = count(next);
    if (L::observes && next.step.remote) {
      head_.issued[stage] = undisturbed_ && far ? window::Delays::mark(now) : window::untimed;
    }
  }

  // Returns when fewer than `quota` stages are on their way. Remote steps are a worker's first.
  __device__ __forceinline__ void keep_window(const Step& step, u32 i) {
    const u32 quota = step.feature >= head_.last_feature ? head_.last_quota : head_.quota;
    if (!undisturbed_) keep_half(i, max(1u, quota / 2));
    if (i >= quota) {
      const u32 behind = i - quota;  // must have arrived
      const u32 stage = behind % configuration.stages;
      const u32 parity = behind / configuration.stages & 1;
      ptx::mbarrier_t* arrival = behind < ahead_ ? &head_.early[stage] : &head_.full[stage];
      if (L::observes && ptx::mbarrier_test_wait_parity(arrival, parity)) {
        delays_.missed(head_.issued[stage]);
        return;
      }
      pipeline::wait<bounded>(arrival, parity, "remote stage full");
      if constexpr (L::observes) delays_.arrived(head_.issued[stage], ptx::cycles());
    }
  }

  // The kernels ahead may have as much on their way: until they have ended, half of the window.
  __device__ __forceinline__ void keep_half(u32 i, u32 half) {
    const auto done = [&] {
      undisturbed_ = ptx::mbarrier_test_wait_parity(&head_.undisturbed, 0);
      return undisturbed_ || i < half || ptx::mbarrier_test_wait_parity(&head_.early[i - half], 0);
    };
    pipeline::wait_until<bounded>(done, 0, "weights of a first stage");
  }

  __device__ __forceinline__ u8* stage_of(u32 stage) const {
    return stages_ + stage * L::stage_bytes;
  }

  __device__ __forceinline__ void load_tokens(u32 depth, u32 stage) {
    ptx::tensor_load(stage_of(stage) + L::weight_bytes, maps_.tokens, static_cast<int>(depth),
                     static_cast<int>(rank_ * arguments_.cta_tokens), &head_.full[stage],
                     ptx::evict_last);
  }

  __device__ __forceinline__ void load_weights(const Load& next, u32 stage,
                                               ptx::mbarrier_t* arrival) {
    u8* weight_tile = stage_of(stage);
    const int depth = static_cast<int>(next.step.depth);
    constexpr u32 bytes_of_weight = L::weight_bytes / L::weights;
#pragma unroll
    for (u32 i = 0; i < L::weights; ++i, weight_tile += bytes_of_weight) {
      if constexpr (configuration.in_out) {
        for (u32 block = 0; block < blocks_in(next.extent); ++block) {
          load(weight_tile + block * L::block_bytes, &maps_.weights[i]->tile,
               next.step.feature + static_cast<int>(block * 64), depth, arrival);
        }
      } else if (!next.step.remote) {
        const int copied = static_cast<int>(arguments_.copied[i]);
        const bool in_ring = next.step.feature >= copied;
        load(weight_tile, in_ring ? maps_.ring[i] : &maps_.weights[i]->tile, depth,
             next.step.feature - (in_ring ? copied : 0), arrival);
      } else if (next.extent.rows() == L::features) {
        load(weight_tile, &maps_.weights[i]->tile, depth, next.step.feature, arrival);
      } else {
        load_rows(weight_tile, *maps_.weights[i], next, arrival);
      }
    }
  }

  // In few boxes, the largest first: an SM has only so many under way.
  __device__ __forceinline__ void load_rows(u8* weight_tile, const RowMaps& maps, const Load& next,
                                            ptx::mbarrier_t* arrival) {
    u32 row = next.extent.begin;
    while (row < next.extent.end) {
      const u32 atoms = (next.extent.end - row) / rows_at_least;
      const u32 box = min(row_boxes - 1, 31u - static_cast<u32>(__clz(static_cast<int>(atoms))));
      load(weight_tile + row * tile::row_bytes, &maps.boxes[box],
           static_cast<int>(next.step.depth), next.step.feature + static_cast<int>(row), arrival);
      row += rows_at_least << box;
    }
  }

  __device__ __forceinline__ void load(u8* target, const ptx::TensorMap* map, int column, int row,
                                       ptx::mbarrier_t* arrival) {
    if constexpr (configuration.cluster) {
      ptx::tensor_load_multicast(target, map, column, row, arrival, ptx::evict_first,
                                 static_cast<u16>((1u << ctas_) - 1));
    } else {
      ptx::tensor_load(target, map, column, row, arrival, ptx::evict_first);
    }
  }

  // Returns whether most of it is remote.
  __device__ __forceinline__ bool count(const Load& next) {
    const u32 depth = next.step.depth;
    const u32 depth_end = min(depth + L::depth, arguments_.depth);
    const u32 feature = static_cast<u32>(next.step.feature + static_cast<int>(next.extent.begin));
    const u32 feature_end = static_cast<u32>(next.step.feature + static_cast<int>(next.extent.end));
    const u32 bytes = (depth_end - depth) * next.extent.rows() * element_bytes;
    u32 all_far = 0;
#pragma unroll
    for (u32 i = 0; i < L::weights; ++i) {
      u32 far = 0;
      if (next.step.remote || copied_ahead<configuration>(arguments_)) {
        const Boundary& edge = head_.boundaries[i];
        far = element_bytes *
              (configuration.in_out
                   ? remote_elements(edge, depth, depth_end, feature, feature_end)
                   : remote_elements(edge, feature, feature_end, depth, depth_end));
      }
      remote_bytes_[i] += far;
      local_bytes_[i] += bytes - far;
      all_far += far;
    }
    return 2 * all_far > L::weights * bytes;
  }

  // Adds what this CTA has asked for to the records of the buffers.
  __device__ __forceinline__ void report() const {
#pragma unroll
    for (u32 i = 0; i < L::weights; ++i) {
      schedule::TierRecord* record = arguments_.weights[i].record;
      if (blockIdx.x == 0) {
        atomicAdd(&record->calls, 1ull);
        if (head_.in_flight > 0) atomicMax(&record->peak_window, u64{head_.in_flight});
      }
      if (local_bytes_[i] > 0) atomicAdd(&record->local_bytes, local_bytes_[i]);
      if (remote_bytes_[i] > 0) atomicAdd(&record->remote_bytes, remote_bytes_[i]);
    }
    if (L::observes && head_.controlled > 0) {
      delays_.report(arguments_.link, head_.controlled, head_.in_flight, ptx::globaltimer());
    }
  }

  const Arguments& arguments_;
  const TensorMaps& maps_;
  Head& head_;
  u8* const stages_;
  const u32 rank_;
  const u32 ctas_;
  u32 ahead_ = 0;             // steps that are asked for before the kernels ahead have ended
  u32 turn_ = 0;              // rank of the CTA that loads the weights of the next step
  u32 cluster_parities_ = 0;  // of cluster_empty, a bit for each stage
  u64 local_bytes_[2] = {0, 0};
  u64 remote_bytes_[2] = {0, 0};
  bool undisturbed_ = false;  // the kernels ahead have ended: what copies take is the link's doing
  window::Delays delays_;
};

}  // namespace dak::linear
