// The steps of one worker in their order: its remote run, its local run, pieces of the tail.
#pragma once

#include "linear/layout.cuh"
#include "schedule/line.cuh"
#include "types.cuh"

namespace dak::linear {

struct Step {
  int feature;  // first of the tile
  u32 depth;    // first of the step
  bool remote;
};

// Remote workers are those of lowest number: started first, they have the most time. Where the
// boundary lies along K they finish the tiles of all others, so there they have the highest numbers,
// and no local run.
template <TieredLinearConfiguration configuration>
__device__ __forceinline__ Assignment assign(const Head& head, u32 worker, u32 workers) {
  const u32 remote_workers = head.remote_workers;
  const u32 order = workers - 1 - worker;
  Assignment made{};
  const auto set_remote = [&](u32 run) {
    made.remote_run = run;
    made.remote = head.remote.run(run);
  };
  const auto set_local = [&](u32 run) {
    made.local_run = run;
    made.local = head.local.run(run);
  };
  if constexpr (configuration.in_out) {
    const u32 apart = workers > remote_workers ? remote_workers : 0;
    if (order < remote_workers) set_remote(order);
    if (order >= apart) set_local(order - apart);
  } else if (worker < remote_workers) {
    set_remote(remote_workers - 1 - worker);
    set_local(head.local.short_runs > 0 ? head.local.long_runs + remote_workers - 1 - worker
                                        : order - head.spared);
  } else if (order >= head.spared && order - head.spared < head.local.long_runs) {
    set_local(order - head.spared);
  }
  return made;
}

class Walk {
 public:
  // `features`: of a tile.
  __device__ __forceinline__ Walk(const Head& head, u32 features)
      : head_(head),
        features_(features),
        local_begin_(head.assignment.local.begin),
        remote_left_(head.assignment.remote.end - head.assignment.remote.begin),
        remote_(remote_left_ > 0) {
    enter(remote_ ? head.assignment.remote.begin : local_begin_);
  }

  // Goes on from there on the local line, or in its tail.
  __device__ __forceinline__ void go_on_at(u32 position) {
    remote_ = false;
    enter(position);
  }

  // At most as many times as the assignment, or the piece of the tail, has steps.
  __device__ __forceinline__ Step next() {
    if (remote_ && remote_left_ == 0) {
      remote_ = false;
      enter(local_begin_);
    }
    const Step step{feature_, step_ * tile::columns, remote_};
    if (remote_) --remote_left_;
    if (++step_ == end_step_) {
      step_ = first_step_;
      feature_ += static_cast<int>(features_);
    }
    return step;
  }

 private:
  __device__ __forceinline__ void enter(u32 position) {
    const schedule::Line& line = remote_ ? head_.remote : head_.local;
    if (line.total() == 0) return;
    const schedule::Place place = line.place(position);
    feature_ = line.origin + static_cast<int>(place.tile * features_);
    step_ = place.step;
    first_step_ = line.first_step;
    end_step_ = line.first_step + line.steps;
  }

  const Head& head_;
  const u32 features_;
  u32 local_begin_;
  u32 remote_left_;
  bool remote_;
  int feature_ = 0;
  u32 step_ = 0;
  u32 first_step_ = 0;
  u32 end_step_ = 0;
};

}  // namespace dak::linear
