// From the residency of the weights, read when the kernel starts, to the lines of work.
#pragma once

#include "linear/arguments.cuh"
#include "linear/layout.cuh"
#include "schedule/line.cuh"
#include "schedule/tail.cuh"
#include "types.cuh"
#include "window/reading.cuh"

namespace dak::linear {

__device__ __forceinline__ u32 divide_up(u32 value, u32 divisor) {
  return (value + divisor - 1) / divisor;
}

// Of numbers below 2^20, for which it is exact; of all others the compiler's takes twice as long.
__device__ __forceinline__ u32 quotient(u32 value, u32 divisor) {
  return static_cast<u32>(__fdividef(static_cast<float>(value) + 0.5f, static_cast<float>(divisor)));
}

// By so much readers may be faster than the local steps beside them need.
constexpr float time_to_spare = 2.0f;

// What is read from device memory, all at once: beside a launch that streams HBM a load takes 2 us.
struct Residency {
  u64 splits[2];
  window::Reading window;

  template <TieredLinearConfiguration configuration>
  static __device__ __forceinline__ Residency read(const Arguments& arguments) {
    Residency found{};
#pragma unroll
    for (u32 i = 0; i < Layout<configuration>::weights; ++i) {
      found.splits[i] = __ldcg(&arguments.weights[i].record->split);
    }
    found.window = window::read(arguments.link, arguments.launch);
    return found;
  }
};

__device__ __forceinline__ Boundary boundary(const Weight& weight, u64 split, u32 rows) {
  const u64 local = split > weight.offset ? split - weight.offset : 0;
  if (local >= rows * weight.row_bytes) return {rows, 0};
  // rows start at multiples of 16 bytes; a 64-bit division would take 0.3 us
  constexpr u32 grain = 16;
  const u32 grains = static_cast<u32>(local / grain);
  const u32 row_grains = static_cast<u32>(weight.row_bytes / grain);
  return {grains / row_grains, grains % row_grains * (grain / element_bytes)};
}

// Whether rows of a weight are read in the ring. All is one line of work then, the local one. Its tiles
// are laid from the first of those rows both ways, so that none has rows of either place: its boxes
// would be more and smaller, and took a product of 4096 x 14336 from 33 to 64 us.
template <TieredLinearConfiguration configuration>
__device__ __forceinline__ bool copied_ahead(const Arguments& arguments) {
  if constexpr (configuration.in_out) return false;
  return min(arguments.copied[0], arguments.copied[1]) < arguments.features;
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

// How a remote line is read.
struct Flight {
  u32 of_tile;       // bytes of a worker that are on their way: in tiles,
  u32 of_last;       // and in the last one
  float last_share;  // of the line's cost
  float bytes;       // of the whole line
  float alone;       // local steps that one worker takes for the whole line
  float wanted;      // workers

  __device__ __forceinline__ float mean() const {
    return static_cast<float>(of_tile) * (1.0f - last_share) +
           static_cast<float>(of_last) * last_share;
  }
};

// Tiles are laid from the boundary both ways, so that none has both kinds of rows: the local tiles
// may begin before feature 0, the remote ones end after the last, where copies read nothing. Where
// the weights are stored [in, out] the boundary lies along K: every tile has steps on both lines,
// and the step that the boundary cuts is a remote one.
template <TieredLinearConfiguration configuration>
__device__ __forceinline__ void lay_lines(const Arguments& arguments, const Residency& residency,
                                          Head& head, schedule::Line& local,
                                          schedule::Line& remote) {
  using L = Layout<configuration>;
  const u32 steps = divide_up(arguments.depth, L::depth);
  const u32 rows = configuration.in_out ? arguments.depth : arguments.features;
  u32 first_row = rows;
  for (u32 i = 0; i < L::weights; ++i) {
    head.boundaries[i] = boundary(arguments.weights[i], residency.splits[i], rows);
    first_row = min(first_row, head.boundaries[i].row);
  }
  if constexpr (configuration.in_out) {
    const u32 tiles = divide_up(arguments.features, L::features);
    const u32 local_steps = first_row == rows ? steps : first_row / L::depth;
    local = {.tiles = tiles, .steps = local_steps};
    remote = {.tiles = tiles, .first_step = local_steps, .steps = steps - local_steps};
  } else {
    constexpr u32 grain = 8;  // features that the epilogue writes at once
    const bool copied = copied_ahead<configuration>(arguments);
    const u32 boundary =
        copied ? min(arguments.copied[0], arguments.copied[1]) : first_row / grain * grain;
    const u32 tiles = divide_up(boundary, L::features);
    const u32 behind = divide_up(arguments.features - boundary, L::features);
    local = {.origin = static_cast<int>(boundary) - static_cast<int>(tiles * L::features),
             .tiles = copied ? tiles + behind : tiles,
             .steps = steps};
    remote = {.origin = static_cast<int>(boundary), .tiles = copied ? 0 : behind, .steps = steps};
  }
  local.last_cost = schedule::unit;
}

// Local steps that one worker alone takes for a step of a remote tile of so many rows.
template <TieredLinearConfiguration configuration>
__device__ __forceinline__ float alone(const Arguments& arguments, u32 rows) {
  using L = Layout<configuration>;
  const float bytes = static_cast<float>(L::weight_bytes / L::features * rows);
  const float by_bytes = bytes * arguments.reader_steps;
  if (configuration.in_out || rows == L::features) return by_bytes;
  return max(by_bytes, arguments.few_steps);
}

// How many workers should read a line that one `alone` takes so long for, beside local steps that
// take all of them `rest`.
//
// As few as are done in good time, since each is missed at local memory and leaves a piece of its
// tile behind. Never more than make the sum of reading and adding up shortest: twice as many read in
// half of the time, and leave twice as many pieces.
__device__ __forceinline__ float wanted_readers(float alone, float adding, float rest) {
  const float ratio = __fdividef(alone, adding);
  const float shortest = 1.0f + ratio * rsqrtf(ratio);
  return rest > 0.0f ? min(shortest, max(1.0f, __fdividef(time_to_spare * alone, rest))) : shortest;
}

// What a remote worker has in flight, in tiles and in the last tile, and how many workers are wanted.
//
// The last tile may have few rows. Its steps bring few bytes each, so more of them may be in flight,
// as many as there are stages. They take a round trip of the link all the same, and on a fast link the
// producer its time: over NVLink 24 rows took 1.0 us a step, a whole tile 0.7.
template <TieredLinearConfiguration configuration>
__device__ __forceinline__ Flight take_quotas(const Arguments& arguments, u32 window, float adding,
                                              float rest, Head& head, schedule::Line& remote) {
  using L = Layout<configuration>;
  head.last_feature = remote.origin + static_cast<int>((remote.tiles - 1) * L::features);
  const u32 last_rows = arguments.features - static_cast<u32>(head.last_feature);
  const u32 last_bytes = L::weight_bytes / L::features * last_rows;
  const float steps = static_cast<float>(remote.steps);
  const float tiles = static_cast<float>(remote.tiles - 1);
  const float tile_alone = alone<configuration>(arguments, L::features);
  const float last_alone = alone<configuration>(arguments, last_rows);
  const float line_alone = steps * (tiles * tile_alone + last_alone);
  const float wanted = wanted_readers(line_alone, adding, rest);

  // two stages for each of many workers, more for each of few
  const u32 fit = max(1u, window / (2 * L::weight_bytes));
  const float readers = min(wanted, static_cast<float>(min(arguments.maximum_remote_workers, fit)));
  const u32 most = min(configuration.stages, max(2u, arguments.worker_bytes / L::weight_bytes));
  const float each = __fdividef(static_cast<float>(window), readers);
  head.quota = max(1u, min(most, static_cast<u32>(each) / L::weight_bytes));
  head.last_quota = min(configuration.stages, quotient(head.quota * L::features, last_rows));
  const float beside_others = max(tile_alone, readers * L::weight_bytes * arguments.link_steps);
  remote.last_cost = max(max(schedule::unit * last_rows / L::features,
                             quotient(schedule::unit * head.quota, head.last_quota)),
                         static_cast<u32>(__fdividef(schedule::unit * last_alone, beside_others)));
  const float last_cost = static_cast<float>(remote.steps * remote.last_cost);
  return {.of_tile = head.quota * L::weight_bytes,
          .of_last = head.last_quota * last_bytes,
          .last_share = __fdividef(last_cost, static_cast<float>(remote.cost())),
          .bytes = steps * (tiles * L::weight_bytes + last_bytes),
          .alone = line_alone,
          .wanted = wanted};
}

// How many workers read remote memory, and the local steps of each of them.
//
// As many as are wanted and fit the window. All have as many local steps as let them end with the runs
// of the others, less half of a worker's share of the tail: who ends early claims more of it, and the
// others wait for pieces of their tiles here. None where the boundary lies along K, where remote
// workers finish the tiles of the others.
template <TieredLinearConfiguration configuration>
__device__ __forceinline__ u32 share_remote(const Arguments& arguments, u32 window, u32 workers,
                                            Head& head, const schedule::Line& local,
                                            schedule::Line& remote) {
  const float tail = static_cast<float>(head.tail.total_steps());
  const float all_local = static_cast<float>(local.total()) + tail;
  // clusters have no tail, which evens out what estimates miss
  const float rest = configuration.cluster ? 0.0f : __fdividef(all_local, static_cast<float>(workers));
  // for each worker
  const float adding = __fdividef(arguments.piece_steps, static_cast<float>(remote.tiles));
  const Flight flight =
      take_quotas<configuration>(arguments, window, adding, rest, head, remote);
  const float each = flight.mean();
  // one worker may have the end of the tile before the last and the start of the last
  const u32 across = remote.tiles > 1 ? flight.of_tile - flight.of_last : 0;
  const float room = static_cast<float>(window) - static_cast<float>(across);
  const float fit = room > each ? __fdividef(room, each) : 1.0f;

  u32 most = arguments.maximum_remote_workers;
  if (local.total() > 0) most = min(most, max(1u, workers - 1));
  const u32 count_wanted = static_cast<u32>(min(fit, flight.wanted));
  remote.share(min(min(count_wanted, most), remote.total()));
  const u32 count = head.remote_workers = remote.long_runs;
  const u32 before_last =
      remote.tiles > 1
          ? min(count, 1 + static_cast<u32>(static_cast<float>(count) * (1.0f - flight.last_share)))
          : 0;
  head.in_flight = before_last * flight.of_tile + (count - before_last) * flight.of_last;
  if (configuration.in_out) return 0;
  const float runs = static_cast<float>(count);
  const float busy = max(max(flight.bytes * arguments.link_steps, __fdividef(flight.alone, runs)),
                         __fdividef(static_cast<float>(remote.total()), runs)) +
                     adding * runs;
  const float fair = __fdividef(all_local + runs * busy, static_cast<float>(workers));
  const float claimed = __fdividef(tail - static_cast<float>(head.spared) * fair,
                                   static_cast<float>(workers - head.spared));
  const float length = fair - busy - 1.5f * max(claimed, 0.0f);
  return length > 0.0f ? static_cast<u32>(length) : 0;
}

// Fills `head`: what is local and what is remote, cut into runs, and the tail. One thread.
template <TieredLinearConfiguration configuration>
__device__ __forceinline__ void plan(const Arguments& arguments, u32 workers, Head& head) {
  schedule::Line local{};
  schedule::Line remote{};
  const Residency residency = Residency::read<configuration>(arguments);
  lay_lines<configuration>(arguments, residency, head, local, remote);
  head.controlled = residency.window.controlled;
  head.remote_workers = 0;
  head.quota = 0;
  head.in_flight = 0;
  head.tail.tiles = head.spared = 0;
  // With nothing remote the last tile's sums, added up when all else is done, cost 5 to 9 us and the
  // tail gains 4 (28672 x 8192, 1 to 32 tokens); beside a remote part it gains 15.
  if (Layout<configuration>::has_tail && remote.total() > 0) {
    head.tail = schedule::Tail::cut_off(local, arguments.tail);
    if (head.tail.tiles > 0) head.spared = min(arguments.tail.spared, workers / 8);
  }
  u32 others = workers;  // who are not remote workers
  if (remote.total() > 0) {
    const u32 length =
        share_remote<configuration>(arguments, residency.window.window, workers, head, local, remote);
    if (workers <= head.remote_workers + head.spared) head.spared = 0;
    if (workers > head.remote_workers) {
      others = workers - head.remote_workers - head.spared;
      if (length > 0) {
        local.short_runs = head.remote_workers;
        local.short_length = length;
      }
    }
  }
  // One worker adds up all pieces of a tile: the larger they are, the fewer.
  constexpr u32 fit = 256 * 1024 / (Layout<configuration>::partial_elements * 4);
  constexpr u32 most_pieces = fit > 12 ? 12 : fit < 3 ? 3 : fit;
  // two CTAs on an SM start long before the launch ahead ends; with a tail the last ones have no run
  const bool evened = configuration.ctas_per_sm > 1 || head.spared > 0;
  const u32 late = evened ? 0 : arguments.late_steps;
  local.share(min(others, max(1u, local.tiles * most_pieces)), late);
  head.remote = remote;
  head.local = local;
}

}  // namespace dak::linear
