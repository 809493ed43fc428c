// The way of a worker along a part of a line, piece by piece: what the part has of each unit.
//
// Unit by unit, or in sweeps: what all units of the part have of a range of tokens, then of the next.
// Where tokens are outermost in memory, a unit's are far apart and those of its neighbours beside
// them: sweeps let all readers be in the same few pages of remote memory at a time. The parts are the
// same either way, and so are who has what of a unit and where its results go.
#pragma once

#include "attention/units.cuh"
#include "schedule/line.cuh"
#include "schedule/tapered_line.cuh"
#include "types.cuh"

namespace dak::attention {

// Tiles [first, last) of a unit; none: no piece.
struct Piece {
  u32 sequence;
  u32 head;
  Span span;
  u32 first;
  u32 last;
  u32 line;  // 0: local, 1: remote
  u32 part;  // of the line
  bool resumes;   // what the part has of the unit began in a sweep before,
  bool complete;  // and does not go on in a later one
};

// What is left of a part of a line.
struct Rest {
  u32 line;
  u32 part;
  u32 begin;  // of the part, on the line
  u32 end;
  u32 left;   // tiles
  // the unit that is next, and the part's first one; `at`: where they begin on the line
  u32 sequence, head, at;
  u32 first_sequence, first_head, first_at;
  // of the sweep, its tokens; a tile belongs to the sweep that has its slot's first token
  int sweep_begin, sweep_end;
  int later;  // the least such token behind this sweep
};

constexpr int no_token = 1 << 30;

template <u32 tile, u32 row_bytes>
class Walk {
 public:
  // `sweep`: tokens of one.
  __device__ __forceinline__ Walk(const Units<tile, row_bytes>& units, const Rest& rest, u32 sweep)
      : units_(units), rest_(rest), sweep_(static_cast<int>(sweep)) {}

  __device__ __forceinline__ const Rest& rest() const { return rest_; }
  __device__ __forceinline__ bool done() const { return rest_.left == 0; }

  // To a part of a line; `batch` sequences.
  __device__ __forceinline__ void enter(u32 line, const schedule::Run& run, u32 part, u32 batch) {
    rest_ = {};
    rest_.line = line;
    rest_.part = part;
    rest_.begin = run.begin;
    rest_.end = run.end;
    rest_.left = run.end - run.begin;
    if (done()) return;
    u32 low = 0;
    u32 high = batch;  // sequence `batch` begins where the line ends
    while (high - low > 1) {
      const u32 middle = (low + high) / 2;
      if (before(middle) <= rest_.begin) {
        low = middle;
      } else {
        high = middle;
      }
    }
    rest_.sequence = low;
    rest_.at = before(low);
    const int first = units_.boundary(low, 0);
    const Span span = units_.span(low, first, line == 1);
    if (span.tiles > 0 && units_.equal_heads(low, first)) {
      rest_.head = (rest_.begin - rest_.at) / span.tiles;
      rest_.at += rest_.head * span.tiles;
    }
    rest_.first_sequence = rest_.sequence;
    rest_.first_head = rest_.head;
    rest_.first_at = rest_.at;
    // from the unit's first token and not from the part's: its other units may begin there
    rest_.sweep_end = line == 1 && sweep_ < no_token ? span.begin + sweep_ : no_token;
    rest_.later = no_token;
  }

  // The part that a worker has before it claims any: a remote run, or its own of a local one.
  __device__ __forceinline__ void enter_first(const Division& division, u32 worker, u32 batch) {
    const u32 line = worker < division.remote_workers;
    const u32 run = line == 1 ? worker : worker - division.remote_workers;
    const schedule::TaperedLine& cut = division.lines[line];
    enter(line, cut.own(run), cut.own_part(run), batch);
  }

  // The next piece; none after the last.
  __device__ __forceinline__ Piece next() {
    if (done()) return {};
    Span span;
    u32 lowest;  // tiles that the part has of the unit,
    u32 highest;
    u32 first;  // and those that the sweep has
    u32 last;
#pragma unroll 1
    for (;;) {
      if (rest_.at >= rest_.end) turn();
      span = units_.span(rest_.sequence, units_.boundary(rest_.sequence, rest_.head),
                         rest_.line == 1);
      lowest = max(rest_.begin, rest_.at) - rest_.at;
      highest = min(span.tiles, rest_.end - rest_.at);
      first = max(lowest, min(highest, tiles_before(span, rest_.sweep_begin)));
      last = min(highest, tiles_before(span, rest_.sweep_end));
      if (last < highest && lowest < highest) {
        const int token = span.begin + static_cast<int>(max(lowest, last) * tile);
        rest_.later = min(rest_.later, token);
      }
      if (first < last) break;
      advance(span.tiles);
    }
    const Piece piece{rest_.sequence, rest_.head, span,           first,
                      last,           rest_.line, rest_.part, first > lowest,
                      last == highest};
    rest_.left -= last - first;
    if (!done()) advance(span.tiles);
    return piece;
  }

 private:
  __device__ __forceinline__ u32 before(u32 sequence) const {
    return units_.sequence(sequence).before[rest_.line];
  }

  // Tiles of a unit of which the slot begins before a token: of the remote line, or all or none.
  static __device__ __forceinline__ u32 tiles_before(const Span& span, int token) {
    if (token >= no_token) return span.tiles;
    return static_cast<u32>(max(0, token - span.begin) + static_cast<int>(tile) - 1) / tile;
  }

  // Back to the first unit, for the next sweep.
  __device__ __forceinline__ void turn() {
    rest_.sequence = rest_.first_sequence;
    rest_.head = rest_.first_head;
    rest_.at = rest_.first_at;
    rest_.sweep_begin = rest_.sweep_end;
    rest_.sweep_end = rest_.later + sweep_;
    rest_.later = no_token;
  }

  // To the next unit; sequences without tiles are passed over.
  __device__ __forceinline__ void advance(u32 tiles) {
    rest_.at += tiles;
    if (++rest_.head < units_.heads()) return;
    rest_.head = 0;
    ++rest_.sequence;
    while (rest_.at < rest_.end && before(rest_.sequence + 1) <= rest_.at) ++rest_.sequence;
  }

  const Units<tile, row_bytes>& units_;
  Rest rest_;
  const int sweep_;
};

}  // namespace dak::attention
