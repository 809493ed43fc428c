// The pieces of one worker in their order: parts of units, of one line.
#pragma once

#include "attention/units.cuh"
#include "schedule/even_line.cuh"
#include "types.cuh"

namespace dak::attention {

// Tiles [first, last) of a unit.
struct Piece {
  u32 sequence;
  u32 head;
  Span span;
  u32 first;
  u32 last;
  u32 run;  // of the line
};

template <u32 tile, u32 row_bytes>
class Walk {
 public:
  __device__ __forceinline__ Walk(const Units<tile, row_bytes>& units, const Division& division,
                                  u32 worker)
      : units_(units),
        remote_(worker < division.remote_workers),
        run_(remote_ ? worker : worker - division.remote_workers) {
    const schedule::Run run = division.lines[remote_].run(run_);
    at_ = run.begin;
    end_ = run.end;
  }

  __device__ __forceinline__ bool remote() const { return remote_; }

  // Finds the first unit; `batch` sequences. Call it once, before `next`.
  __device__ __forceinline__ void seek(u32 batch) {
    if (at_ == end_) return;
    u32 low = 0;
    u32 high = batch;  // sequence `batch` begins where the line ends
    while (high - low > 1) {
      const u32 middle = (low + high) / 2;
      if (before(middle) <= at_) {
        low = middle;
      } else {
        high = middle;
      }
    }
    sequence_ = low;
    begin_ = before(low);
    const int first = units_.boundary(low, 0);
    const u32 tiles = units_.span(low, first, remote_).tiles;
    if (tiles > 0 && units_.equal_heads(low, first)) {
      head_ = (at_ - begin_) / tiles;
      begin_ += head_ * tiles;
    }
  }

  // The next piece; false after the last.
  __device__ __forceinline__ bool next(Piece& piece) {
    if (at_ == end_) return false;
    Span span = units_.span(sequence_, units_.boundary(sequence_, head_), remote_);
    while (at_ >= begin_ + span.tiles) {
      begin_ += span.tiles;
      if (++head_ == units_.heads()) {
        head_ = 0;
        do ++sequence_;
        while (before(sequence_ + 1) <= at_);
      }
      span = units_.span(sequence_, units_.boundary(sequence_, head_), remote_);
    }
    piece = {sequence_, head_, span, at_ - begin_, min(span.tiles, end_ - begin_), run_};
    at_ = begin_ + piece.last;
    return true;
  }

 private:
  __device__ __forceinline__ u32 before(u32 sequence) const {
    return units_.sequence(sequence).before[remote_];
  }

  const Units<tile, row_bytes>& units_;
  const bool remote_;
  const u32 run_;
  u32 at_;
  u32 end_;
  u32 sequence_ = 0;
  u32 head_ = 0;
  u32 begin_ = 0;  // of the unit, on the line
};

}  // namespace dak::attention
