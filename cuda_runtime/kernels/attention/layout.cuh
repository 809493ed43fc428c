// Sizes that follow from a configuration of the attention kernel.
#pragma once

#include "attention/arguments.cuh"
#include "attention/task.cuh"
#include "attention/units.cuh"
#include "attention/walk.cuh"
#include "ptx/mbarrier.cuh"
#include "tile/panel.cuh"
#include "types.cuh"
#include "window/reading.cuh"

namespace dak {

struct TieredAttentionConfiguration {
  u32 head_dim;
  u32 tile;            // tokens that are multiplied at once: 32, 64 or 128
  u32 slots;           // tiles of keys or values that each team holds
  u32 teams;           // 2: each consumer warpgroup has work of its own; 1: both share each tile
  bool half;           // fp16, else bf16
  bool bounded_waits;  // barriers that never complete end the kernel with their name
};

namespace attention {

constexpr u32 consumer_warpgroups = 2;
constexpr u32 threads = 128 * (consumer_warpgroups + 1);
constexpr u32 warpgroup_threads = 128;
constexpr u32 warpgroup_rows = 64;  // of the first operand of wgmma: queries
constexpr u32 maximum_slots = 16;
// A task is written when all slots of the tasks before are asked for, at least two of each. So who
// is still about the task that lay there before would have to hold more slots than there are.
constexpr u32 maximum_tasks = 10;
static_assert(2 * (maximum_tasks - 1) > maximum_slots);

// The head of shared memory; queries and slots follow at `head_bytes`.
struct Head {
  ptx::mbarrier_t full[consumer_warpgroups][maximum_slots];
  ptx::mbarrier_t empty[consumer_warpgroups][maximum_slots];
  ptx::mbarrier_t announced[consumer_warpgroups][maximum_tasks];
  Task tasks[consumer_warpgroups][maximum_tasks];
  Rest rests[consumer_warpgroups];   // what a producer has left,
  Piece first[consumer_warpgroups];  // and its first piece, found ahead of the kernels before
  u32 in_flight[consumer_warpgroups][maximum_slots];  // remote bytes asked for into a slot
  u32 last[consumer_warpgroups];  // whether a warpgroup was the last to arrive
  u32 issued[consumer_warpgroups][maximum_slots];     // window::Delays' marks of them
  window::Reading window;  // of the link
  u32 remote_units;
  u32 remote_tokens;   // of all units,
  u32 longest_remote;  // and of the longest
  Division division;
  Sequence sequences[maximum_batch + 1];
};

constexpr u32 head_bytes = 11 * 1024;
static_assert(sizeof(Head) <= head_bytes);

template <TieredAttentionConfiguration configuration>
struct Layout {
  static constexpr u32 head_dim = configuration.head_dim;
  static constexpr u32 wide_panels = head_dim / 64;
  static constexpr u32 tail = head_dim % 64;  // width of the last panel, or 0
  static constexpr u32 row_bytes = head_dim * element_bytes;
  static constexpr u32 chunks = row_bytes / 16;
  static constexpr u32 tile = configuration.tile;
  static constexpr u32 slot_bytes = tile * row_bytes;
  static constexpr u32 query_bytes = warpgroup_rows * row_bytes;
  static constexpr u32 warpgroups = consumer_warpgroups / configuration.teams;  // of a team
  static constexpr u32 rows = warpgroups * warpgroup_rows;                      // of a unit
  static constexpr u32 shared_bytes = head_bytes + consumer_warpgroups * query_bytes +
                                      configuration.teams * configuration.slots * slot_bytes;

  static_assert(head_dim % 16 == 0 && (tail == 0 || tail == 16 || tail == 32));
  static_assert(tile == 32 || tile == 64 || tile == 128);
  static_assert(configuration.slots >= 2 && configuration.slots <= maximum_slots);
  static_assert(configuration.teams == 1 || configuration.teams == 2);
  static_assert(shared_bytes <= 227 * 1024);

  // Where a panel begins in a tile of `height` rows.
  static __device__ __forceinline__ u32 panel_offset(u32 panel, u32 height) {
    return panel * height * tile::Panel<64>::row_bytes;
  }
};

// Arrivals that complete a phase of each barrier, from who arrives there.
template <TieredAttentionConfiguration configuration>
struct Arrivals {
  static constexpr u32 full = 1;  // the producer, which also announces bytes
  static constexpr u32 empty = Layout<configuration>::warpgroups;  // one thread of each
  static constexpr u32 announced = 1;                              // the producer
};

}  // namespace attention
}  // namespace dak
