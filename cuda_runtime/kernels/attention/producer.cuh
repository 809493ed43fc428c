// The thread that keeps a team's keys and values in flight into shared memory.
#pragma once

#include "attention/arguments.cuh"
#include "attention/layout.cuh"
#include "attention/units.cuh"
#include "attention/walk.cuh"
#include "pipeline/ring.cuh"
#include "pipeline/wait.cuh"
#include "ptx/tensor_copy_4d.cuh"
#include "types.cuh"

namespace dak::attention {

constexpr u32 boxes = 4;

// Keys or values, in boxes of 8, 16, 32 and 64 tokens of one head, as wide as a panel.
struct BoxMaps {
  ptx::TensorMap boxes[attention::boxes];
};

struct CacheMaps {
  BoxMaps wide;  // panels of 64 columns
  BoxMaps tail;  // the narrower panel behind them
};

struct TensorMaps {
  CacheMaps caches[2];  // keys, values
};

template <TieredAttentionConfiguration configuration>
class Producer {
  using L = Layout<configuration>;
  using TeamUnits = Units<L::tile, L::row_bytes>;
  static constexpr bool bounded = configuration.bounded_waits;

 public:
  // `slots`: of the team.
  __device__ __forceinline__ Producer(const Arguments& arguments, const TensorMaps& maps,
                                      Head& head, u8* slots, u32 team)
      : arguments_(arguments), maps_(maps), head_(head), slots_(slots), team_(team) {}

  __device__ __forceinline__ void run(u32 worker) {
    const TeamUnits units(arguments_, head_.division, head_.sequences);
    Walk<L::tile, L::row_bytes> walk(units, head_.division, worker);
    walk.seek(arguments_.batch);
    Piece piece;
    while (walk.next(piece)) {
      const u32 local_tokens[2] = {count(units, piece, walk.remote(), 0),
                                   count(units, piece, walk.remote(), 1)};
#pragma unroll 1
      for (u32 i = piece.first; i < piece.last; ++i) {
        const int first = TeamUnits::first_token(piece.span, i, walk.remote());
        const int end = min(first + static_cast<int>(L::tile), piece.span.end);
#pragma unroll 1
        for (u32 side = 0; side < 2; ++side) {
          const u32 local = side == 0 ? local_tokens[0] : local_tokens[1];
          fill(side, piece, first, end > static_cast<int>(local));
        }
      }
    }
    report(worker);
  }

 private:
  // Counts what a piece reads of keys or values; returns how many tokens of the head are all local.
  __device__ __forceinline__ u32 count(const TeamUnits& units, const Piece& piece, bool remote,
                                       u32 side) {
    const Edge edge = units.edge(side, piece.sequence, piece.head);
    const int begin =
        max(piece.span.begin, TeamUnits::first_token(piece.span, piece.first, remote));
    const int end = min(piece.span.end, TeamUnits::first_token(piece.span, piece.last, remote));
    const u64 local = TeamUnits::local_bytes(edge, begin, end);
    local_bytes_[side] += local;
    remote_bytes_[side] += static_cast<u64>(end - begin) * L::row_bytes - local;
    return edge.tokens;
  }

  // Loads the next slot, with the tile whose first token is `first`.
  __device__ __forceinline__ void fill(u32 side, const Piece& piece, int first, bool remote) {
    const Rows rows = TeamUnits::rows(piece.span, first);
    const u32 bytes = (rows.end - rows.begin) * L::row_bytes;
    const u32 slot = position_.stage;
    ptx::mbarrier_t* full = &head_.full[team_][slot];
    pipeline::wait<bounded>(&head_.empty[team_][slot], position_.parity ^ 1, "slot empty");
    // what was in the slot before has arrived
    if (pending_ == configuration.slots) retire();
    if (remote) keep_window(bytes);
    head_.in_flight[team_][slot] = remote ? bytes : 0;
    ++pending_;
    ptx::mbarrier_arrive_expect_tx(full, bytes);
    u8* target = slots_ + slot * L::slot_bytes;
    const CacheMaps& maps = maps_.caches[side];
    u32 row = rows.begin;
    u32 box = boxes - 1;
    while (row < rows.end) {
      const u32 box_rows = rows_at_least << box;
      if (row + box_rows > rows.end) {
        --box;
        continue;
      }
#pragma unroll
      for (u32 panel = 0; panel < L::wide_panels; ++panel) {
        load(target + L::panel_offset(panel, L::tile) + row * tile::Panel<64>::row_bytes,
             &maps.wide.boxes[box], panel, piece, first + static_cast<int>(row), full);
      }
      if constexpr (L::tail > 0) {
        load(target + L::panel_offset(L::wide_panels, L::tile) + row * 2 * L::tail,
             &maps.tail.boxes[box], L::wide_panels, piece, first + static_cast<int>(row), full);
      }
      row += box_rows;
    }
    position_.advance(configuration.slots);
  }

  __device__ __forceinline__ void load(u8* target, const ptx::TensorMap* map, u32 panel,
                                       const Piece& piece, int token, ptx::mbarrier_t* full) {
    ptx::tensor_load_4d(target, map, static_cast<int>(panel * 64),
                        static_cast<int>(piece.head / arguments_.row_blocks),
                        static_cast<int>(piece.sequence), token, full, ptx::evict_first);
  }

  // Returns when `bytes` more may be asked for. A worker with remote tiles has no others.
  __device__ __forceinline__ void keep_window(u32 bytes) {
    while (in_flight_ > 0 && in_flight_ + bytes > head_.division.quota) {
      pipeline::wait<bounded>(&head_.full[team_][oldest_.stage], oldest_.parity,
                              "remote slot full");
      retire();
    }
    in_flight_ += bytes;
    most_in_flight_ = max(most_in_flight_, in_flight_);
  }

  // The oldest slot that was asked for is no longer in flight.
  __device__ __forceinline__ void retire() {
    in_flight_ -= head_.in_flight[team_][oldest_.stage];
    oldest_.advance(configuration.slots);
    --pending_;
  }

  // Adds what this team has asked for to the records of the buffers.
  __device__ __forceinline__ void report(u32 worker) const {
#pragma unroll
    for (u32 side = 0; side < 2; ++side) {
      schedule::TierRecord* record = arguments_.caches[side].record;
      if (record == nullptr) continue;
      // keys and values may lie in one buffer: that is one call
      const bool again = side == 1 && record == arguments_.caches[0].record;
      if (worker == 0 && !again) atomicAdd(&record->calls, 1ull);
      if (local_bytes_[side] > 0) atomicAdd(&record->local_bytes, local_bytes_[side]);
      if (remote_bytes_[side] > 0) atomicAdd(&record->remote_bytes, remote_bytes_[side]);
      if (most_in_flight_ > 0) {
        // as if all remote workers had their most at once
        atomicMax(&record->peak_window,
                  static_cast<u64>(most_in_flight_) * head_.division.remote_workers);
      }
    }
  }

  const Arguments& arguments_;
  const TensorMaps& maps_;
  Head& head_;
  u8* const slots_;
  const u32 team_;
  pipeline::RingPosition position_{};
  pipeline::RingPosition oldest_{};  // slot that may still be in flight
  u32 pending_ = 0;                  // slots from there on
  u32 in_flight_ = 0;                // bytes
  u32 most_in_flight_ = 0;
  u64 local_bytes_[2] = {0, 0};
  u64 remote_bytes_[2] = {0, 0};
};

}  // namespace dak::attention
