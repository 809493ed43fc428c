// From the residency of the weights, read when the kernel starts, to the lines of work.
#pragma once

#include "linear/arguments.cuh"
#include "linear/layout.cuh"
#include "schedule/line.cuh"
#include "types.cuh"

namespace dak::linear {

__device__ __forceinline__ u32 divide_up(u32 value, u32 divisor) {
  return (value + divisor - 1) / divisor;
}

__device__ __forceinline__ Boundary boundary(const Weight& weight, u32 rows) {
  const u64 split = __ldcg(&weight.record->split);
  const u64 local = split > weight.offset ? split - weight.offset : 0;
  if (local >= rows * weight.row_bytes) return {rows, 0};
  // rows start at multiples of 16 bytes; a 64-bit division would take 0.3 us
  constexpr u32 grain = 16;
  const u32 grains = static_cast<u32>(local / grain);
  const u32 row_grains = static_cast<u32>(weight.row_bytes / grain);
  return {grains / row_grains, grains % row_grains * (grain / element_bytes)};
}

// Remote elements of the box [row, row_end) x [column, column_end) of a weight.
__device__ __forceinline__ u32 remote_elements(const Boundary& boundary, u32 row, u32 row_end,
                                               u32 column, u32 column_end) {
  if (row_end <= boundary.row) return 0;
  const u32 width = column_end - column;
  if (row > boundary.row) return (row_end - row) * width;
  const u32 local = boundary.column <= column ? 0 : min(boundary.column - column, width);
  return (row_end - boundary.row) * width - local;
}

// Fills `head`: what is local and what is remote, cut into runs. One thread.
//
// Tiles are laid from the boundary both ways, so that none has both kinds of rows: the local tiles
// may begin before feature 0, the remote ones end after the last, where copies read nothing. Where
// the weights are stored [in, out] the boundary lies along K: every tile has steps on both lines,
// and the step that the boundary cuts is a remote one.
template <TieredLinearConfiguration configuration>
__device__ __forceinline__ void plan(const Arguments& arguments, u32 workers, Head& head) {
  using L = Layout<configuration>;
  const u32 steps = divide_up(arguments.depth, L::depth);
  const u32 rows = configuration.in_out ? arguments.depth : arguments.features;
  u32 first_row = rows;
  for (u32 i = 0; i < L::weights; ++i) {
    head.boundaries[i] = boundary(arguments.weights[i], rows);
    first_row = min(first_row, head.boundaries[i].row);
  }

  schedule::Line local{};
  schedule::Line remote{};
  if constexpr (configuration.in_out) {
    const u32 tiles = divide_up(arguments.features, L::features);
    const u32 local_steps = first_row == rows ? steps : first_row / L::depth;
    local = {.tiles = tiles, .steps = local_steps};
    remote = {.tiles = tiles, .first_step = local_steps, .steps = steps - local_steps};
  } else {
    constexpr u32 grain = 8;  // features that the epilogue writes at once
    const u32 boundary = first_row / grain * grain;
    const u32 tiles = divide_up(boundary, L::features);
    local = {.origin = static_cast<int>(boundary) - static_cast<int>(tiles * L::features),
             .tiles = tiles,
             .steps = steps};
    remote = {.origin = static_cast<int>(boundary),
              .tiles = divide_up(arguments.features - boundary, L::features),
              .steps = steps};
  }

  local.last_cost = schedule::unit;
  head.remote_workers = 0;
  head.quota = 0;
  u32 local_of_remote = 0;
  if (remote.total() > 0) {
    const u32 window = __ldcg(arguments.window);
    // The last tile may have few rows. Its steps bring few bytes each, so more of them may be in
    // flight, as many as there are stages; they take a round trip of the link all the same.
    head.last_feature = remote.origin + static_cast<int>((remote.tiles - 1) * L::features);
    const u32 last_rows = arguments.features - static_cast<u32>(head.last_feature);
    const u32 last_bytes = L::weight_bytes / L::features * last_rows;  // of a step
    head.quota = max(1u, min(L::stages_in_flight, window / L::weight_bytes));
    head.last_quota = min(configuration.stages, head.quota * L::features / last_rows);
    remote.last_cost = max(schedule::unit * last_rows / L::features,
                           schedule::unit * head.quota / head.last_quota);
    // as many workers as fill the window, each with its share of the last tile
    const float cost = static_cast<float>(remote.cost());
    const float of_last = static_cast<float>(remote.steps * remote.last_cost) / cost;
    const float in_flight = (1.0f - of_last) * static_cast<float>(head.quota * L::weight_bytes) +
                            of_last * static_cast<float>(head.last_quota * last_bytes);
    u32 count = max(1u, static_cast<u32>(static_cast<float>(window) / in_flight));
    count = min(min(count, arguments.maximum_remote_workers), remote.total());
    if (local.total() > 0) count = min(count, max(1u, workers - 1));
    remote.share(count);
    head.remote_workers = count = remote.long_runs;
    // Where products take the time, remote workers have local steps too, as far as all then end
    // together. Not where the boundary lies along K: there they finish the tiles of the others.
    if (arguments.remote_step_cost > 0 && !configuration.in_out) {
      const u32 busy =
          remote.cost() / schedule::unit / count * arguments.remote_step_cost / schedule::unit;
      const u32 fair = (local.total() + count * busy) / workers;
      local_of_remote = fair > busy ? fair - busy : 0;
    }
  }
  if (workers > head.remote_workers) {
    local.short_runs = head.remote_workers;
    local.short_length = local_of_remote;
  }
  // one worker adds up all pieces of a tile: not too many of them
  constexpr u32 most_pieces = 12;
  local.share(min(workers - local.short_runs, max(1u, local.tiles * most_pieces)));
  head.remote = remote;
  head.local = local;
}

}  // namespace dak::linear
