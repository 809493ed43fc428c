// The thread that keeps a team's keys and values in flight into shared memory.
#pragma once

#include "attention/arguments.cuh"
#include "attention/layout.cuh"
#include "attention/task.cuh"
#include "attention/units.cuh"
#include "attention/walk.cuh"
#include "pipeline/ring.cuh"
#include "pipeline/wait.cuh"
#include "ptx/memory_order.cuh"
#include "ptx/tensor_copy_4d.cuh"
#include "ptx/timer.cuh"
#include "schedule/tapered_line.cuh"
#include "types.cuh"
#include "window/delays.cuh"

namespace dak::attention {

constexpr u32 boxes = 7;

// Keys or values, in boxes of 1, 2, 4 and so on to 64 tokens of one head, as wide as a panel.
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
  // `slots`: of the team. `worker` of `workers`.
  __device__ __forceinline__ Producer(const Arguments& arguments, const TensorMaps& maps,
                                      Head& head, u8* slots, u32 team, u32 worker, u32 workers)
      : arguments_(arguments),
        maps_(maps),
        head_(head),
        slots_(slots),
        team_(team),
        worker_(worker),
        claims_{head.division.lines[0].claimable(), workers} {}

  // Finds a worker's first piece, and asks L2 for its first tiles. Nothing here depends on what the
  // kernels before still write: copies to shared memory would, of the newest tokens.
  static __device__ __forceinline__ void prepare(const Arguments& arguments,
                                                 const TensorMaps& maps, Head& head, u32 team,
                                                 u32 worker) {
    const TeamUnits units(arguments, head.division, head.sequences);
    Walk<L::tile, L::row_bytes> walk(units, Rest{}, arguments.sweep_tokens);
    walk.enter_first(head.division, worker, arguments.batch);
    const Piece piece = walk.next();
    head.rests[team] = walk.rest();
    head.first[team] = piece;
    head.tasks[team][0] = Task::of_piece(units, head.division, piece, arguments.batch);
    // host memory has no place in L2
    if (piece.line == 1) return;
    const u32 last = min(piece.last, piece.first + configuration.slots / 2);
#pragma unroll 1
    for (u32 i = piece.first; i < last; ++i) {
      const int first = TeamUnits::first_token(piece.span, i, false);
#pragma unroll 1
      for (u32 side = 0; side < 2; ++side) prefetch(arguments, maps.caches[side], piece, first);
    }
  }

  // All pieces of the worker; after `prepare`.
  __device__ __forceinline__ void run() {
    const TeamUnits units(arguments_, head_.division, head_.sequences);
    Walk<L::tile, L::row_bytes> walk(units, head_.rests[team_], arguments_.sweep_tokens);
    Piece piece = head_.first[team_];
    pipeline::RingPosition task;
    for (;;) {
      ptx::mbarrier_arrive(&head_.announced[team_][task.stage]);
      if (piece.first == piece.last) break;
      read(units, piece, walk.done());
      if (walk.done()) claim(walk);
      piece = walk.next();
      task.advance(maximum_tasks);
      head_.tasks[team_][task.stage] =
          Task::of_piece(units, head_.division, piece, arguments_.batch);
    }
    report();
  }

 private:
  // Asks for all tiles of a piece, and where nothing comes after it for a chunk of the local line.
  __device__ __forceinline__ void read(const TeamUnits& units, const Piece& piece, bool final) {
    const bool remote = piece.line == 1;
    const u32 local_tokens[2] = {count(units, piece, remote, 0), count(units, piece, remote, 1)};
#pragma unroll 1
    for (u32 i = piece.first; i < piece.last; ++i) {
      const int first = TeamUnits::first_token(piece.span, i, remote);
      const int end = min(first + static_cast<int>(L::tile), piece.span.end);
      // late, so that who is slow claims less, and early enough for an answer in time
      if (final && i + 1 == piece.last && claims_.chunks > 0) {
        before_ = ptx::add_relaxed_gpu(arguments_.counters, 1);
      }
#pragma unroll 1
      for (u32 side = 0; side < 2; ++side) {
        const int local = static_cast<int>(side == 0 ? local_tokens[0] : local_tokens[1]);
        fill(side, piece, first, units.rows(piece.span, first), end > local, first >= local);
      }
    }
  }

  // Takes the chunk that was asked for, if there is one.
  __device__ __forceinline__ void claim(Walk<L::tile, L::row_bytes>& walk) {
    if (claims_.chunks == 0) return;
    if (claims_.granted(before_)) {
      const schedule::TaperedLine& line = head_.division.lines[0];
      walk.enter(0, line.chunk(before_), line.chunk_part(before_), arguments_.batch);
    } else if (claims_.last(before_)) {
      *arguments_.counters = 0;
    }
  }

  static __device__ __forceinline__ void prefetch(const Arguments& arguments,
                                                  const CacheMaps& maps, const Piece& piece,
                                                  int first) {
    constexpr u32 box = L::tile == 32 ? boxes - 2 : boxes - 1;
    const int head = static_cast<int>(arguments.blocks.quotient(piece.head));
    const int sequence = static_cast<int>(piece.sequence);
#pragma unroll 1
    for (u32 row = 0; row < L::tile; row += 1u << box) {
      const int token = first + static_cast<int>(row);
#pragma unroll 1
      for (u32 panel = 0; panel < L::wide_panels + (L::tail > 0); ++panel) {
        const BoxMaps& map = panel < L::wide_panels ? maps.wide : maps.tail;
        ptx::tensor_prefetch_4d(&map.boxes[box], static_cast<int>(panel * 64), head, sequence,
                                token);
      }
    }
  }

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

  // Loads the next slot, with the tile whose first token is `first`. `whole`: nothing of it is local.
  __device__ __forceinline__ void fill(u32 side, const Piece& piece, int first, const Rows& rows,
                                       bool remote, bool whole) {
    const u32 bytes = (rows.end - rows.begin) * L::row_bytes;
    const u32 slot = position_.stage;
    ptx::mbarrier_t* full = &head_.full[team_][slot];
    if (pending_ == configuration.slots) {  // what was in the slot before must have arrived
      if (in_flight_ > 0) await_oldest();
      retire();
    }
    pipeline::wait<bounded>(&head_.empty[team_][slot], position_.parity ^ 1, "slot empty");
    if (remote) keep_window(bytes);
    head_.in_flight[team_][slot] = remote ? bytes : 0;
    head_.issued[team_][slot] = whole ? window::Delays::mark(ptx::cycles()) : window::untimed;
    ++pending_;
    ptx::mbarrier_arrive_expect_tx(full, bytes);
    u8* target = slots_ + slot * L::slot_bytes;
    const CacheMaps& maps = maps_.caches[side];
    u32 row = rows.begin;
    u32 box = boxes - 1;
    while (row < rows.end) {
      const u32 box_rows = 1u << box;
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
                        static_cast<int>(arguments_.blocks.quotient(piece.head)),
                        static_cast<int>(piece.sequence), token, full, ptx::evict_first);
  }

  // Returns when `bytes` more may be asked for.
  __device__ __forceinline__ void keep_window(u32 bytes) {
    while (in_flight_ > 0 && in_flight_ + bytes > head_.division.quota) {
      await_oldest();
      retire();
    }
    in_flight_ += bytes;
    most_in_flight_ = max(most_in_flight_, in_flight_);
  }

  __device__ __forceinline__ void await_oldest() {
    ptx::mbarrier_t* full = &head_.full[team_][oldest_.stage];
    const u32 mark = head_.issued[team_][oldest_.stage];
    if (ptx::mbarrier_test_wait_parity(full, oldest_.parity)) {
      delays_.missed(mark);
      return;
    }
    pipeline::wait<bounded>(full, oldest_.parity, "remote slot full");
    delays_.arrived(mark, ptx::cycles());
  }

  // The oldest slot that was asked for is no longer in flight.
  __device__ __forceinline__ void retire() {
    in_flight_ -= head_.in_flight[team_][oldest_.stage];
    oldest_.advance(configuration.slots);
    --pending_;
  }

  // Adds what this team has asked for to the records of the buffers.
  __device__ __forceinline__ void report() const {
#pragma unroll
    for (u32 side = 0; side < 2; ++side) {
      schedule::TierRecord* record = arguments_.caches[side].record;
      if (record == nullptr) continue;
      // keys and values may lie in one buffer: that is one call
      const bool again = side == 1 && record == arguments_.caches[0].record;
      if (worker_ == 0 && !again) atomicAdd(&record->calls, 1ull);
      if (local_bytes_[side] > 0) atomicAdd(&record->local_bytes, local_bytes_[side]);
      if (remote_bytes_[side] > 0) atomicAdd(&record->remote_bytes, remote_bytes_[side]);
      if (most_in_flight_ > 0) {
        // as if all remote workers had their most at once
        atomicMax(&record->peak_window,
                  static_cast<u64>(most_in_flight_) * head_.division.remote_workers);
      }
    }
    if (head_.window.controlled > 0) {
      delays_.report(arguments_.link, head_.window.controlled,
                     most_in_flight_ * head_.division.remote_workers, ptx::globaltimer());
    }
  }

  const Arguments& arguments_;
  const TensorMaps& maps_;
  Head& head_;
  u8* const slots_;
  const u32 team_;
  const u32 worker_;
  const schedule::Claims claims_;
  u32 before_ = 0;  // claims before this worker's last
  pipeline::RingPosition position_{};
  pipeline::RingPosition oldest_{};  // slot that may still be in flight
  u32 pending_ = 0;                  // slots from there on
  u32 in_flight_ = 0;                // bytes
  u32 most_in_flight_ = 0;
  u64 local_bytes_[2] = {0, 0};
  u64 remote_bytes_[2] = {0, 0};
  window::Delays delays_;
};

}  // namespace dak::attention
