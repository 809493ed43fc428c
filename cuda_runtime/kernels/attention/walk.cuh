// The way of a worker along a part of a line, piece by piece: what the part has of each unit.
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
};

// What is left of a part of a line, and the unit where it begins.
struct Rest {
  u32 line;
  u32 part;
  u32 at;
  u32 end;
  u32 sequence;
  u32 head;
  u32 begin;  // of the unit, on the line
};

template <u32 tile, u32 row_bytes>
class Walk {
 public:
  __device__ __forceinline__ Walk(const Units<tile, row_bytes>& units, const Rest& rest)
      : units_(units), rest_(rest) {}

  __device__ __forceinline__ const Rest& rest() const { return rest_; }
  __device__ __forceinline__ bool done() const { return rest_.at == rest_.end; }

  // To a part of a line; `batch` sequences.
  __device__ __forceinline__ void enter(u32 line, const schedule::Run& run, u32 part, u32 batch) {
    rest_ = {line, part, run.begin, run.end, 0, 0, 0};
    if (done()) return;
    u32 low = 0;
    u32 high = batch;  // sequence `batch` begins where the line ends
    while (high - low > 1) {
      const u32 middle = (low + high) / 2;
      if (before(middle) <= rest_.at) {
        low = middle;
      } else {
        high = middle;
      }
    }
    rest_.sequence = low;
    rest_.begin = before(low);
    const int first = units_.boundary(low, 0);
    const u32 tiles = units_.span(low, first, line == 1).tiles;
    if (tiles > 0 && units_.equal_heads(low, first)) {
      rest_.head = (rest_.at - rest_.begin) / tiles;
      rest_.begin += rest_.head * tiles;
    }
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
#pragma unroll 1
    for (;;) {
      span = units_.span(rest_.sequence, units_.boundary(rest_.sequence, rest_.head),
                         rest_.line == 1);
      if (rest_.at < rest_.begin + span.tiles) break;
      rest_.begin += span.tiles;
      if (++rest_.head == units_.heads()) {
        rest_.head = 0;
        do ++rest_.sequence;
        while (before(rest_.sequence + 1) <= rest_.at);
      }
    }
    const Piece piece{rest_.sequence, rest_.head,
                      span,           rest_.at - rest_.begin,
                      min(span.tiles, rest_.end - rest_.begin), rest_.line,
                      rest_.part};
    rest_.at = rest_.begin + piece.last;
    return piece;
  }

 private:
  __device__ __forceinline__ u32 before(u32 sequence) const {
    return units_.sequence(sequence).before[rest_.line];
  }

  const Units<tile, row_bytes>& units_;
  Rest rest_;
};

}  // namespace dak::attention
